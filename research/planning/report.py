"""A plan for people, and as a record for programs."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from research.config import Config
from research.devices.chips import GIB
from research.planning.estimate import Adapted, Plan
from research.planning.topology import Topology


def describe(config: Config, topology: Topology, plan: Plan) -> str:
    """The figures, a line each."""
    estimate = "" if topology.exact else " (an estimate: compiled for simulated CPU devices)"
    frozen = f", frozen {_number(plan.frozen_parameters)}" if plan.frozen_parameters else ""
    lines = [
        f"topology    {topology.name}: {topology.count} devices, mesh {_shape(plan) or 'one chip'}{estimate}",
        f"model       {_number(plan.parameters)} parameters{frozen}"
        f"; remat {config.model.remat}, {config.microbatches} microbatches",
        f"step        {plan.tokens:,} tokens, {plan.model_flops:.3g} model FLOPs",
        *_memory(config, topology, plan),
        *_adapted(config, plan.policy),
        *([f"servers     {plan.servers.describe(topology)}"] if plan.servers else []),
        *(
            f"network     {each.kind}: {each.calls:,} calls, {_size(each.bytes)} a chip"
            for each in plan.collectives
            if each.bytes
        ),
        *_time(config, topology, plan),
        f"compiled    in {plan.compile_seconds:.0f} s",
    ]
    return "\n".join(lines)


def describe_attempt(config: Config, plan: Plan) -> str:
    """A line about one setting of a search."""
    verdict = f"{plan.least:.3g} to {plan.most:.3g} s"
    if not plan.fits:
        verdict = f"doesn't fit ({plan.compiler or 'memory'})"
    return f"tried       {_shape(plan)}; remat {config.model.remat}, {config.microbatches} microbatches: {verdict}"


def record(config: Config, topology: Topology, plan: Plan) -> dict[str, Any]:
    """The figures as JSON has them."""
    return {
        "topology": topology.name,
        "remat": config.model.remat,
        "microbatches": config.microbatches,
        "fits": plan.fits,
        "used": plan.used,
        **dataclasses.asdict(plan),
    }


def _shape(plan: Plan) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1)


def _memory(config: Config, topology: Topology, plan: Plan) -> Iterator[str]:
    kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in plan.bytes_of.items() if size > plan.used / 1000)
    if plan.compiler:
        yield f"memory      DOESN'T FIT: the compiler {plan.compiler}. Before temporaries, a chip: {kinds}"
    else:
        verdict = "fits" if plan.fits else f"DOESN'T FIT, by {_size(plan.used - plan.memory)}"
        yield f"memory      {_size(plan.used)} of {plan.memory / GIB:.1f} GiB a chip: {verdict}. {kinds}".rstrip()
    if not plan.fits:
        yield f"            {_advice(config, topology, plan)}"


def _adapted(config: Config, policy: Adapted | None) -> Iterator[str]:
    """What the policy holds by kind, where not all of it is trained, and what that saves beside full fine-tuning."""
    if policy is None:
        return
    held = "" if config.frozen_dtype == "auto" else f" in {config.frozen_dtype}"
    full = sum(policy.full.values())
    yield (
        f"policy      base{held} {_size(policy.base)}, {config.adapter.get('kind', 'trained')} {_size(policy.trained)} "
        f"({policy.parameters:,} parameters), gradients {_size(policy.gradients)}, optimizer {_size(policy.optimizer)}"
    )
    kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in policy.full.items())
    yield (
        f"            {_size(policy.used)} of {_size(full)} that full fine-tuning has ({kinds}): "
        f"{_size(policy.saved)} saved, {policy.saved / full:.0%}"
    )


def _number(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.3g} MiB"


def _time(config: Config, topology: Topology, plan: Plan) -> Iterator[str]:
    """Seconds, utilisation, tokens a day and the cost; nothing of a program that couldn't be compiled."""
    if plan.compiler:
        return
    bounds = plan.least, plan.most
    peak = topology.count * topology.chip.flops
    best_mfu, worst_mfu = (plan.model_flops / (seconds * peak) for seconds in bounds)
    best_day, worst_day = (86400 * plan.tokens / seconds / 1e9 for seconds in bounds)
    yield "roofline    " + ", ".join(f"{kind} {seconds:.3g} s" for kind, seconds in plan.seconds.items())
    yield (
        f"estimate    {plan.least:.3g} s a step where all overlaps, {plan.most:.3g} s where nothing does: "
        f"MFU {best_mfu:.0%} to {worst_mfu:.0%}, {best_day:.2f} to {worst_day:.2f} B tokens a day"
    )
    price = config.plan.prices.get(topology.kind, 0.0)
    if price:
        hours = [config.steps * seconds / 3600 for seconds in bounds]
        cost = [h * topology.count * price for h in hours]
        steps = f"{config.steps:,} steps" + " (how many the epochs are, the data decides)" * bool(config.epochs)
        yield (
            f"cost        {steps}: {hours[0]:.2f} to {hours[1]:.2f} h, {cost[0]:,.2f} to "
            f"{cost[1]:,.2f} (plan.prices.{topology.kind} = {price} a chip and hour)"
        )


def _advice(config: Config, topology: Topology, plan: Plan) -> str:
    """What would make it fit."""
    state = sum(plan.bytes_of.get(kind, 0) for kind in ("parameters", "optimizer", "frozen"))
    unsharded = plan.mesh["data"] * plan.mesh["sequence"] * plan.mesh["expert"]
    if state > plan.memory * 0.9:
        if unsharded > 1:
            return f"Parameters and optimizer alone are too much: give mesh.fsdp the {unsharded} of the other axes."
        need = math.ceil(topology.count * state / (plan.memory * 0.8))
        return f"Parameters and optimizer alone are too much: take {need} chips or more."
    if config.model.remat != "full":
        return "Set model.remat='full', or raise microbatches; --search tries them."
    rows = config.batch_size // (config.microbatches * plan.mesh["data"] * plan.mesh["fsdp"] * plan.mesh["expert"])
    if rows > 1:
        return f"Raise microbatches: each chip takes {rows} rows at a time; --search tries."
    return "One row a chip is too much: raise mesh.sequence or mesh.tensor; --search tries."
