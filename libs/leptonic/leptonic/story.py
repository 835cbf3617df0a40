"""A story as a tree: one trace, then every trace it came from, then what came of it.

Read downwards from a prediction one comes to the registration of its model, the training run, the
dataset version and the publishes of its records. A span says which traces it links to, by the
first digits of their ids; each trace is drawn once, in a section of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

Span = Mapping[str, Any]
SIBLINGS_MAX = 3
"""Spans of one name and service below one parent that are drawn before they are counted."""
ALIKE_MAX = 2
"""Traces with the same beginnings that are drawn before they are counted."""
LINKS_SHOWN = 3
ID_SHOWN = 8
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
        self.sources: dict[str, list[str]] = {}
        for span in self.spans:
            self.place(span)

    def place(self, span: Span) -> None:
        trace, parent = span["trace_id"], (span["trace_id"], span["parent_id"])
        if parent in self.by_id:
            self.children.setdefault(parent, []).append(span)
        else:
            self.roots.setdefault(trace, []).append(span)
        self.sources.setdefault(trace, []).extend(sources_of(span))

    def came_from(self, trace: str) -> list[str]:
        """Every trace that links lead to from this one, the nearest first."""
        found = [trace]
        for one in found:
            fresh = (source for source in self.sources.get(one, []) if source not in found)
            found += dict.fromkeys(fresh)
        return found[1:]

    def draw_traces(self, root: Tree, traces: Sequence[str], label: str) -> None:
        """A section each; of those that look alike only the first few."""
        alike: dict[str, int] = {}
        for trace in traces:
            look = " ".join(title(span) for span in self.roots.get(trace, []))
            alike[look] = alike.get(look, 0) + 1
            if self.everything or alike[look] <= ALIKE_MAX:
                self.draw_trace(root, trace, label)
        for look, count in alike.items():
            if count > ALIKE_MAX and not self.everything:
                text = f"{label} {count - ALIKE_MAX} more traces of {look or 'spans not stored'}"
                root.add(Text(text, style="dim"))

    def draw_trace(self, root: Tree, trace: str, label: str) -> None:
        head = Text(f"{label} trace ".lstrip(), style="cyan", no_wrap=True)
        head.append(trace, style="bold cyan")
        if trace not in self.roots:
            root.add(head.append(" (not stored)", style="dim"))
            return
        start = min(span["start_ns"] for span in self.roots[trace])
        self.draw_spans(root.add(head), self.roots[trace], start)

    def draw_spans(self, branch: Tree, spans: Sequence[Span], start_ns: int) -> None:
        left_out: dict[str, list[Span]] = {}
        shown: dict[str, int] = {}
        for span in spans:
            kind = title(span)
            shown[kind] = shown.get(kind, 0) + 1
            if shown[kind] > SIBLINGS_MAX and not self.everything:
                left_out.setdefault(kind, []).append(span)
                continue
            below = branch.add(line(span, start_ns))
            children = self.children.get((span["trace_id"], span["span_id"]), [])
            self.draw_spans(below, children, start_ns)
        for kind, hidden in left_out.items():
            total = sum(one["end_ns"] - one["start_ns"] for one in hidden)
            text = f"{kind}: {len(hidden)} more, {duration(total)} in all"
            branch.add(Text(text, style="dim"))


def tree(told: Mapping[str, Any], everything: bool = False) -> Tree:
    """The trace, what it came from, what came of it."""
    story = Story(told, everything)
    count = f"{len(story.spans)} spans in {len(story.roots)} traces"
    root = Tree(Text(f"the story of {told['trace_id']}: {count}", style="bold"))
    story.draw_trace(root, told["trace_id"], "")
    sources = story.came_from(told["trace_id"])
    story.draw_traces(root, sources, "came from")
    results = [t for t in story.roots if t != told["trace_id"] and t not in sources]
    story.draw_traces(root, results, "led to")
    return root


def sources_of(span: Span) -> list[str]:
    """The other traces that a span links to."""
    linked = dict.fromkeys(link["trace_id"] for link in span["links"])
    return [trace for trace in linked if trace != span["trace_id"]]


def title(span: Span) -> str:
    """`ingest land`: the service, and the name without the service."""
    name = str(span["name"]).removeprefix(f"{span['service']} ")
    return f"{span['service']} {name}"


def line(span: Span, start_ns: int) -> Text:
    """`service name  12.3 ms  at +0.4 s  key=value  <- 750339cd`."""
    service, _, name = title(span).partition(" ")
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(service, style="magenta")
    text.append(f" {name}", style="bold red" if span["status"] == "error" else "bold")
    text.append(f"  {duration(span['end_ns'] - span['start_ns'])}", style="green")
    text.append(f"  at +{duration(span['start_ns'] - start_ns)}", style="dim")
    if span["status"] == "error":
        text.append(f"  {span['status_message']}", style="red")
    if sources := sources_of(span):
        named = " ".join(trace[:ID_SHOWN] for trace in sources[:LINKS_SHOWN])
        more = f" and {len(sources) - LINKS_SHOWN} more" if len(sources) > LINKS_SHOWN else ""
        text.append(f"  <- {named}{more}", style="cyan")
    for key, value in shown_attributes(span["attributes"]):
        text.append(f"  {key.removeprefix('leptonic.')}={value}", style="dim")
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
