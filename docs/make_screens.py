"""Makes the pictures of docs/ from what the commands print and write: python docs/make_screens.py RUN [STUDY].

RUN is the workdir of a run and STUDY that of a study, both finished. Needs Chromium. console.png is the run's log.txt,
preview.png what `understudy preview` prints on a terminal, report.png and study.png are the pages.
"""

import contextlib
import fcntl
import html
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
WIDTH, COLUMNS = 1300, 160
LARGEST = 150_000  # bytes of a picture
STYLES = {"1": "font-weight:bold", "2": "opacity:.55", "9": "text-decoration:line-through", "7": "background:#444"}
STYLES |= {"31": "color:#f07f7f", "32": "color:#5fcf9c", "33": "color:#e8a75c", "34": "color:#7da7f0"}
STYLES |= {"35": "color:#c79bf2", "36": "color:#6fd0d8"}


def main(argv: list[str]) -> None:
    run = Path(argv[0])
    log = [line[21:].replace(str(run), f"runs/{run.name}") for line in (run / "log.txt").read_text().splitlines()]
    shot(
        terminal("python -m research.main --config=experiments/sft.py", "\n".join([*log[:24], "...", *log[-9:]])),
        "console",
    )
    command = ["understudy", "preview", "--config=experiments/sft.py", "--rows=2"]
    shot(terminal(" ".join(command), on_terminal([sys.executable, "-m", "research", *command[1:]])), "preview")
    shot(run / "report/report.html", "report", 1000)
    if len(argv) > 1:
        shot(Path(argv[1]) / "report.html", "study", 1150)


def on_terminal(command: list[str]) -> str:
    """What a command prints on a terminal of COLUMNS columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    chunks = []
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(ours, 2**16):
            chunks.append(chunk)
    process.wait()
    return b"".join(chunks).decode()


def terminal(command: str, text: str) -> str:
    """A page that looks as a terminal does."""
    text = re.sub(r"[^\n]*\r\x1b\[K|\r", "", text)  # a line of status is gone once the next is there
    pieces, open_spans = [], 0
    for piece in re.split(r"(\x1b\[[0-9;]*m)", text):
        if not piece.startswith("\x1b"):
            pieces.append(html.escape(piece))
            continue
        for code in piece[2:-1].split(";"):
            if code in STYLES:
                pieces.append(f'<span style="{STYLES[code]}">')
                open_spans += 1
            elif code in ("", "0"):
                pieces.append("</span>" * open_spans)
                open_spans = 0
    style = "margin:0;padding:18px;background:#121419;color:#dfe3ea;font:13px/1.45 monospace;white-space:pre-wrap"
    return f'<meta charset="utf-8"><body style="{style}"><b>$ {html.escape(command)}</b>\n{"".join(pieces)}</body>'


def shot(page: str | Path, name: str, height: int = 0) -> None:
    """Writes docs/NAME.png, a picture of the top of a page; by default so high as a terminal's text is."""
    if isinstance(page, str):
        text = html.unescape(re.sub(r"<[^>]*>", "", page))
        height = 40 + 19 * sum(1 + len(line) // COLUMNS for line in text.splitlines())
    with tempfile.TemporaryDirectory() as folder:
        path = page if isinstance(page, Path) else Path(folder) / "page.html"
        if isinstance(page, str):
            path.write_text(page)
        png = Path(folder) / "page.png"
        size = f"--window-size={WIDTH},{height}"
        flags = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=3000", size]
        subprocess.run(["chromium", *flags, f"--screenshot={png}", path.resolve().as_uri()], check=True)
        small = io.BytesIO()
        Image.open(png).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT).save(small, "PNG", optimize=True)
    if small.tell() > LARGEST:
        raise SystemExit(f"docs/{name}.png: {small.tell():,} bytes, and {LARGEST:,} is the most. Lower its height.")
    (DOCS / f"{name}.png").write_bytes(small.getvalue())


if __name__ == "__main__":
    main(sys.argv[1:])
