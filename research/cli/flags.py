"""One flag of a command, and the flags that several commands have."""

import dataclasses
from collections.abc import Callable
from typing import Any

from research.cli import values
from research.errors import InputError


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
      name: without its dashes.
      help: what it says; without the default, which is added.
      default: its value where it isn't given; of a `many` flag an empty list, of a `switch` False.
      shown: what the help says the default is, where `default` doesn't say it.
      metavar: what the help calls its value; "" of a switch.
      parse: text -> value; raises ValueError with what the value must be.
      required: whether it must be given.
      unless: flags with any of which it needn't be.
      many: whether it may come several times; its value is then a list.
      empty: whether its value may be the empty text.
      of: flags without all of which it has no effect.
    """

    name: str
    help: str
    default: Any = None
    shown: str = ""
    metavar: str = ""
    parse: Callable[[str], Any] = str
    required: bool = False
    unless: tuple[str, ...] = ()
    many: bool = False
    empty: bool = False
    of: tuple[str, ...] = ()

    @property
    def switch(self) -> bool:
        return self.default is False

    @property
    def spelling(self) -> str:
        return f"--{self.name}" if self.switch else f"--{self.name}={self.metavar or 'TEXT'}"

    @property
    def note(self) -> str:
        if self.required and self.unless:
            return f"Required. With {' or '.join(f'--{name}' for name in self.unless)} it may be left out."
        if self.required:
            return "Required."
        default = self.shown or ("off" if self.switch else "none" if self.default in (None, "") else self.default)
        return f"Default: {default}." + (" Can be repeated." if self.many else "")

    def read(self, text: str | None, negated: bool = False) -> Any:
        """The value that the command line gives.

        Args:
          text: after the equals sign; None where there is none.
          negated: whether it is a switch that was spelt --noNAME.

        Raises:
          InputError: the value is at fault.
        """
        if self.switch:
            return self._read_switch(text, negated)
        name = self.name
        if text is None:
            raise InputError(f"--{name}: has no value. Write {self.spelling}.")
        if not text and not self.empty and (self.many or not self.required):
            raise InputError(f"--{name}: is empty. Write {self.spelling}, or leave it out.")
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"--{name} = {text!r}: isn't text in the encoding of this terminal. Write it in UTF-8.")
        try:
            return self.parse(text)
        except ValueError as error:
            raise InputError(f"--{name} = {text}: {error}") from error

    def _read_switch(self, text: str | None, negated: bool) -> bool:
        texts = {None: True, "true": True, "True": True, "1": True, "false": False, "False": False, "0": False}
        if text not in texts:
            raise InputError(f"--{'no' if negated else ''}{self.name} = {text}: must be true or false.")
        return texts[text] != negated


def value(name: str, text: str, parse: Callable[[str], Any]) -> Any:
    """Parses the value of a flag late, where its parser takes long to import.

    Raises:
      InputError: the value is at fault.
    """
    return Flag(name, "", parse=parse).read(text)


MODEL = Flag(
    "model",
    "a run's workdir, a Hugging Face folder or hub name, or a .gguf file",
    metavar="MODEL",
    parse=values.path,
    required=True,
)
STEP = Flag(
    "step",
    "of a run: which checkpoint, or 'best' by the run's checkpoint.best_metric",
    shown="the newest",
    metavar="N",
    parse=values.step,
)
EMA = Flag("ema", "of a run: take the moving average of the parameters", False)
ADAPTER = Flag(
    "adapter",
    "put this adapter to the model: a folder of PEFT, or a run's workdir. Of several, as NAME=DIR, each record names "
    'one in a field "adapter", or "base" for none',
    metavar="[NAME=]DIR",
    many=True,
)
TEMPLATE = Flag(
    "template",
    "how records are put to the model: auto, model, chat or plain",
    shown="as in training, or the model's own",
    metavar="NAME",
    parse=values.one_of("auto", "model", "chat", "plain"),
)
OVERWRITE = Flag("overwrite", "replace the output where it is there", False, of=("output",))
SERVERS = Flag(
    "servers",
    "vLLM servers of the same model, which answer in its place (docs/rl.md); --model says how they are asked, and is "
    "compared with them",
    (),
    "the devices here",
    "URL,...",
    values.urls,
)
SEED = Flag("seed", "of what is drawn by chance", 0, metavar="N", parse=values.seed)
MESH = Flag("mesh", "as in data=4,tensor=2", {"data": -1}, "all devices share the batch", "AXES", values.mesh)
BATCH_TOKENS = Flag(
    "batch_tokens",
    "tokens of a batch, padding included, on each device that shares in it",
    8192,
    metavar="N",
    parse=values.whole(1),
)
