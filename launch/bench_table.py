"""The report of launch/bench.py as text: its rows, their notes, and what the columns mean."""

from typing import Any

from launch.bench_rows import Row

HEAD = tuple("job|what||ours|theirs|theirs/ours|agreement|floor|ours/floor".split("|"))


def table(report: dict[str, Any]) -> str:
    """All rows as text, and what the columns mean."""

    def cell(side: dict[str, Any] | str) -> str:
        if isinstance(side, str):
            return side
        return f"{side['median']:.3g} [{side['min']:.3g}–{side['max']:.3g}]"

    def number(line: Row, name: str) -> str:
        return f"{line[name]:.3g}" if name in line else "–"

    lines: list[tuple[str, ...]] = [HEAD]
    for line in report["rows"]:
        extrapolated = line.get("theirs_extrapolated_from")
        theirs = cell(line["theirs"]) + f" (from {extrapolated})" * bool(extrapolated)
        agreement = f"{number(line, 'agreement')} {line.get('agreement_is', '')}"
        lines.append(
            (
                *(line["job"], line["what"], line["unit"], cell(line["ours"]), theirs),
                *(number(line, "theirs_over_ours"), agreement),
                *(number(line, "floor"), number(line, "ours_over_floor")),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    peaks = report["machine"]["peaks"]
    most: dict[str, float] = {}
    for worker in report["workers"]:
        name = f"{worker['job']} {worker['side']}"
        most[name] = max(most.get(name, 0), worker["peak_rss_mib"])
    return "\n".join(
        [
            *text,
            "",
            *(f"{r['job']}, {r['what']}: {r['note']}." for r in report["rows"] if "note" in r),
            "ours, theirs: median [min–max]; (from k): extrapolated from k candidates to all.",
            "theirs/ours: their time over ours on the same job; above 1, ours is faster.",
            "ours/floor: our time over the least that this machine could take; 1 cannot be beaten.",
            f"machine: {peaks['gflops']:.0f} GFLOP/s in float32 products (XLA "
            f"{peaks['xla_gflops']:.0f}, PyTorch {peaks['torch_gflops']:.0f}), "
            f"{peaks['gb_s']:.1f} GB/s copied (read + written)",
            "peak memory [MiB]: " + ", ".join(f"{k} {v:.0f}" for k, v in most.items()),
            *held(report["rows"]),
        ]
    )


def held(rows: list[Row]) -> list[str]:
    """Our peak memory as a multiple of what has to be held, one figure for each job."""
    found = {}
    for line in rows:
        if "memory" in line:
            m = line["memory"]
            cache = f" and {m['cache_mib']:.0f} of cache" if "cache_mib" in m else ""
            found[line["job"]] = (
                f"{line['job']} {m['peak_over_held']:.3g} (weights of {m['weights_mib']:.0f} MiB"
                f"{cache})"
            )
    return ["ours, peak memory over weights and cache: " + ", ".join(found.values())] * bool(found)
