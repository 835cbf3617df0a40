"""A story as a tree: one trace's spans, and under each link the trace it came from.

Read downwards from a prediction one comes to the registration of its model, the training run, the
dataset version and the publishes of its records.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

Span = Mapping[str, Any]
SIBLINGS_MAX = 3
"""Spans of one name and service below one parent that are drawn before they are counted."""
TRACES_MAX = 8
"""Traces that one span came from, or led to, that are drawn before they are counted."""
ATTRIBUTES_SHOWN = (
    "leptonic.dataset", "leptonic.rows", "leptonic.model", "leptonic.version", "leptonic.job",
    "rows", "dataset", "model", "version", "job", "number", "epoch",
)  # fmt: skip


class Story:
    """The spans of a story, found by trace, by parent, and by what linked to them."""

    def __init__(self, told: Mapping[str, Any], everything: bool) -> None:
        self.everything = everything
        self.spans: list[Span] = sorted(told["spans"], key=lambda span: span["start_ns"])
        self.by_id = {(span["trace_id"], span["span_id"]): span for span in self.spans}
        self.children: dict[tuple[str, str], list[Span]] = {}
        self.roots: dict[str, list[Span]] = {}
        self.results: dict[str, list[str]] = {}
        self.drawn: set[str] = set()
        for span in self.spans:
            self.place(span)

    def place(self, span: Span) -> None:
        trace, parent = span["trace_id"], (span["trace_id"], span["parent_id"])
        if parent in self.by_id:
            self.children.setdefault(parent, []).append(span)
        else:
            self.roots.setdefault(trace, []).append(span)
        for link in span["links"]:
            led_to = self.results.setdefault(link["trace_id"], [])
            if link["trace_id"] != trace and trace not in led_to:
                led_to.append(trace)

    def draw_trace(self, branch: Tree, trace: str, label: str) -> None:
        """A trace's spans below a line that names it; only mentioned where it is drawn already."""
        head = Text(f"{label} ", style="cyan")
        head.append(trace, style="dim")
        if trace in self.drawn or trace not in self.roots:
            known = "above" if trace in self.drawn else "not stored"
            branch.add(head.append(f" ({known})", style="dim"))
            return
        self.drawn.add(trace)
        start = min(span["start_ns"] for span in self.roots[trace])
        self.draw_spans(branch.add(head), self.roots[trace], start)

    def draw_spans(self, branch: Tree, spans: Sequence[Span], start_ns: int) -> None:
        shown: dict[tuple[str, str], int] = {}
        left_out: dict[tuple[str, str], list[Span]] = {}
        for span in spans:
            kind = (span["service"], span["name"])
            shown[kind] = shown.get(kind, 0) + 1
            if shown[kind] > SIBLINGS_MAX and not self.everything:
                left_out.setdefault(kind, []).append(span)
                continue
            self.draw_span(branch, span, start_ns)
        for (service, name), hidden in left_out.items():
            total = sum(one["end_ns"] - one["start_ns"] for one in hidden)
            text = f"{service} {name}: {len(hidden)} more, {duration(total)} in all"
            branch.add(Text(text, style="dim"))

    def draw_span(self, branch: Tree, span: Span, start_ns: int) -> None:
        below = branch.add(line(span, start_ns))
        key = (span["trace_id"], span["span_id"])
        self.draw_spans(below, self.children.get(key, []), start_ns)
        sources = list(dict.fromkeys(link["trace_id"] for link in span["links"]))
        self.draw_traces(below, [s for s in sources if s != span["trace_id"]], "from trace")

    def draw_traces(self, branch: Tree, traces: Sequence[str], label: str) -> None:
        limit = len(traces) if self.everything else TRACES_MAX
        for trace in traces[:limit]:
            self.draw_trace(branch, trace, label)
        if len(traces) > limit:
            branch.add(Text(f"{label}: {len(traces) - limit} more", style="dim"))


def tree(told: Mapping[str, Any], everything: bool = False) -> Tree:
    """What the trace came from below its spans, then what came of it."""
    story = Story(told, everything)
    count = f"{len(story.spans)} spans, {len(story.roots)} traces"
    root = Tree(Text(f"the story of {told['trace_id']}: {count}", style="bold"))
    story.draw_trace(root, told["trace_id"], "trace")
    story.draw_traces(root, story.results.get(told["trace_id"], []), "led to trace")
    return root


def line(span: Span, start_ns: int) -> Text:
    """`service name  12.3 ms  at +0.4 s  key=value`."""
    text = Text()
    text.append(span["service"], style="magenta")
    text.append(f" {span['name']}", style="bold red" if span["status"] == "error" else "bold")
    text.append(f"  {duration(span['end_ns'] - span['start_ns'])}", style="green")
    text.append(f"  at +{duration(span['start_ns'] - start_ns)}", style="dim")
    for name, value in shown_attributes(span["attributes"]):
        text.append(f"  {name.removeprefix('leptonic.')}={value}", style="dim")
    if span["status"] == "error":
        text.append(f"  {span['status_message']}", style="red")
    return text


def shown_attributes(attributes: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return ((name, attributes[name]) for name in ATTRIBUTES_SHOWN if name in attributes)


def duration(nanoseconds: float) -> str:
    """In the unit that reads best."""
    if nanoseconds < 1e9:
        return f"{nanoseconds / 1e6:.1f} ms"
    return f"{nanoseconds / 1e9:.2f} s"


def services_of(told: Mapping[str, Any]) -> list[str]:
    """The services a story passes through, in the order it came to them."""
    spans = sorted(told["spans"], key=lambda span: span["start_ns"])
    return list(dict.fromkeys(span["service"] for span in spans))
