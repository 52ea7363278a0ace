"""The table of docs/serving.md about load and faults, from the csv of the soak."""

from benchmarks import rows
from benchmarks.soak import COLUMNS, SOAKS
from benchmarks.tables import NOTHING, number, table

COUNTED = {
    "wrong": "wrong answers",
    "failed": "requests that failed for no reason",
    "lost": "adapters and versions lost",
    "slots_kept": "slots kept by clients that went",
    "answered": "answers that are those of the adapter alone",
    "refused": "refused as they must be: removed, or damaged in the store",
    "hung_up": "clients that hung up; what they had read was right",
    "sent_again": "sent again, since the server was killed",
    "loads": "adapters loaded since the last kill",
    "evictions": "evicted since then",
}
"""Column of the csv → row of the page."""
TIMES = ("first_token_p50_ms", "first_token_p99_ms")


def block() -> str:
    """What stands on the page."""
    runs = rows.rows_in(SOAKS, COLUMNS)
    if not runs:
        return NOTHING
    one = max(runs, key=lambda row: (int(row["requests"]), row["date"]))
    before, after = one["memory_mb"].split()
    measured = [
        ["time to first token, median and 99th of 100", *(f"{number(float(one[c]))} ms" for c in TIMES)],
        ["tokens a second, while the server was up", number(float(one["tokens_per_second"])), ""],
        ["memory of the server after the last kill, first and second half", f"{before} MB", f"{after} MB"],
    ]
    counted = [[label, f"{int(one[name]):,}", ""] for name, label in COUNTED.items()]
    return "\n\n".join(
        [
            f"{int(one['requests']):,} requests of {one['clients']} clients over {int(one['adapters']):,} adapters, "
            f"{int(one['of_the_base']):,} to the base and {int(one['of_a_version']):,} to a named version, in "
            f"{float(one['seconds']):.0f} s of which the server was down for {float(one['seconds_down']):.0f}; "
            f"{one['kills']} kills; changes meanwhile: {one['changes']}. {one['device']}, {one['threads']} thread, "
            f"{one['others']} cores kept busy by others; {one['date'][:10]}; {one['versions']}; seed {one['seed']}, "
            f"revision {one['revision']}.",
            table(["", "", ""], [*counted, *measured], left=1),
            f"Of {int(one['solo_answers']):,} pairs of adapter and prompt {int(one['distinct_solo_answers']):,} "
            f"have an answer that no other adapter gives to that prompt; {one['put_checked']} of them were computed by "
            f"PEFT's model with the adapter on it as well, {one['put_differs']} differ. {one['ambiguous']} requests "
            "were under way while what they named changed, and may have met either.",
        ]
    )
