"""Draws the rooflines of plans: their work, and what their chip allows.

A point has its FLOPs per byte as x, and the FLOP/s of the least time that it can take as y. The
roof above it is the chip's peak or, if bytes are the limit, the bandwidth times FLOPs per byte.
Main memory and the links to other chips have a panel each.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lsg_flax.chips import CHIPS, parse_topology
from lsg_flax.figures import new_figure
from lsg_flax.files import check_file, file_aside
from lsg_flax.planning.hlo import ProgramReport
from lsg_flax.planning.settings import Plan, least_time

_KINDS = (".png", ".svg", ".pdf")
_LIMITS = {"compute": "FLOPs", "memory": "memory traffic", "communication": "collectives"}
_MARKERS = {"a step": "o", "custom kernels": "^", "before the first step": "s"}
_MARGIN = 8.0  # how far a panel goes beyond its points and the roof's edge, as a factor
_WIDTH, _HEIGHT, _LINE = 4.4, 3.8, 0.22  # inches of a panel, and of a line of the legend


class RooflinePoint(NamedTuple):
    """Work of one chip.

    Attributes:
        what: "a step", "custom kernels" (those of the step) or "before the first step".
        flops: of matrix products.
        bytes: to and from main memory.
        sent: bytes to other chips.
        seconds: the least time that it can take.
        limit: what takes that time: "FLOPs", "memory traffic" or "collectives".
    """

    what: str
    flops: float
    bytes: float
    sent: float
    seconds: float
    limit: str


def roofline_points(plan: Plan) -> list[RooflinePoint]:
    """Returns the work of a plan that has FLOPs: a step, its custom kernels where their work is
    known, and what generation does before its first step. A refused plan has none."""
    chip, program = parse_topology(plan.settings.topology).chip, plan.program
    if chip is None or program is None:
        return []
    points = [_point("a step", program, plan.times)]
    if program.kernel_flops and program.kernel_bytes:
        flops, moved = program.kernel_flops, program.kernel_bytes
        times = {"compute": flops / chip.flops, "memory": moved / chip.bandwidth}
        kernels = program._replace(flops=flops, bytes=moved, collectives=())
        points.append(_point("custom kernels", kernels, times))
    if plan.generation:
        before = plan.generation.prefill, plan.generation.prefill_times
        points.append(_point("before the first step", *before))
    return [point for point in points if point.flops and point.bytes]


def _point(what: str, program: ProgramReport, times: dict[str, float]) -> RooflinePoint:
    sent = sum(c.wire_bytes for c in program.collectives)
    limit = max(_LIMITS, key=lambda name: times.get(name, 0.0))
    least = least_time(times) or 0.0
    return RooflinePoint(what, program.flops, program.bytes, sent, least, _LIMITS[limit])


def check_roofline(topology: str, file: pathlib.Path) -> None:
    """Raises the errors of `draw_roofline` about chip and file, before anything is compiled.

    Raises:
        ValueError: for a topology without a chip, and for a file of another kind.
        OSError: if no file can be written there.
        ImportError: without matplotlib.
    """
    if parse_topology(topology).chip is None:
        raise ValueError(
            f"topology={topology!r} has no known peaks, from which {file} is drawn; give one of "
            f"TPUs or GPUs: {', '.join(CHIPS)}."
        )
    if file.suffix not in _KINDS:
        raise ValueError(f"{file} must end in {', '.join(_KINDS)}, the formats of pictures.")
    folder = check_file(file).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder to write {file.name} into; make it first.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to; give {file.name} another folder.")
    new_figure((1.0, 1.0), file)


def draw_roofline(file: pathlib.Path, plans: Mapping[str, Plan]) -> None:
    """Draws plans for one kind of chip, by the names that they have in the picture, as a roofline
    (Williams et al. 2009, doi 10.1145/1498765.1498785).

    Raises:
        ValueError: for plans of several kinds of chips, plans without any FLOPs (all were refused),
            and as `check_roofline`.
        OSError, ImportError: as `check_roofline`.
    """
    for plan in plans.values():
        check_roofline(plan.settings.topology, file)
    figure = roofline_figure(file, plans)
    with file_aside(file) as aside:
        figure.savefig(aside, dpi=150)


def roofline_figure(file: pathlib.Path, plans: Mapping[str, Plan]) -> Any:
    """Returns the figure of `draw_roofline`, with axes for each panel; raises as that does."""
    kinds = {parse_topology(plan.settings.topology).kind for plan in plans.values()}
    drawn = {
        _heading(name, plan): points
        for name, plan in plans.items()
        if (points := roofline_points(plan))
    }
    if len(kinds) != 1 or not drawn:
        raise ValueError(
            f"{file} is not drawn: it needs plans with FLOPs for one kind of chip, but "
            f"{len(drawn)} of {len(plans)} plans for {', '.join(sorted(kinds)) or 'none'} have "
            "FLOPs. A program that the compiler refuses has none; make it fit first."
        )
    (kind,) = kinds
    chip, every = CHIPS[kind], [point for points in drawn.values() for point in points]
    panels = [_Panel("main memory", chip.flops, chip.bandwidth, "bytes")]
    if any(point.sent for point in every):
        panels.append(_Panel("links to other chips", chip.flops, chip.links, "sent"))
    lines = sum(len(points) + 1 for points in drawn.values())
    figure = new_figure((_WIDTH * max(len(panels), 1.3), _HEIGHT + _LINE * lines), file)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_points(axes, panel, drawn)
        _draw_roof(axes, panel, [p for p in every if getattr(p, panel.field)])
    figure.suptitle(f"Roofline of one {kind} chip")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left")
    return figure


def _heading(name: str, plan: Plan) -> str:
    unknown = plan.program.unknown_kernels if plan.program else 0
    return f"{name} ({unknown:,} kernels of unknown work count no FLOPs)" if unknown else name


class _Panel(NamedTuple):
    """Where bytes go, the chip's FLOP/s and bytes/s, and the field of points with these bytes."""

    title: str
    peak: float
    rate: float
    field: str


def _draw_points(axes: Any, panel: _Panel, drawn: Mapping[str, list[RooflinePoint]]) -> None:
    for number, (name, points) in enumerate(drawn.items()):
        axes.plot([], [], " ", label=name)
        for point in points:
            given = getattr(point, panel.field)
            across = [point.flops / given] if given else []  # only the legend if it sends nothing
            up = [point.flops / point.seconds] * len(across)
            label = f"{point.what}: {1e3 * point.seconds:,.2f} ms at least, by its {point.limit}"
            style = {"marker": _MARKERS[point.what], "color": f"C{number}", "markersize": 9}
            axes.plot(across, up, linestyle="", label=label, zorder=3, **style)


def _draw_roof(axes: Any, panel: _Panel, points: list[RooflinePoint]) -> None:
    """Draws the roof over these points, its two numbers, and where its parts meet."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    edge = panel.peak / panel.rate
    found = [edge, *(p.flops / getattr(p, panel.field) for p in points)]
    low, high = min(found) / _MARGIN, max(found) * _MARGIN
    axes.plot([low, edge, high], [low * panel.rate, panel.peak, panel.peak], color="black")
    axes.axvline(edge, color="gray", linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), title=panel.title)
    axes.set(xlabel=f"FLOPs per byte ({panel.title})", ylabel="FLOP/s of one chip")
    slowest = min([low * panel.rate, *(p.flops / p.seconds for p in points)])
    axes.set_ylim(slowest / 2, panel.peak * 2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    peak, rate = EngFormatter("FLOP/s")(panel.peak), EngFormatter("B/s")(panel.rate)
    axes.text(high, panel.peak * 1.15, f"{peak} in bfloat16 ", ha="right", va="bottom")
    axes.text(low, low * panel.rate, f"      {rate}", va="bottom")
    axes.text(edge, slowest / 1.8, f" {edge:,.0f} FLOPs per byte", color="gray", va="bottom")
    axes.grid(color="#dddddd", linewidth=0.5)
