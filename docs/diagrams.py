"""Draws a diagram of each model family from the code of its file.

    python docs/diagrams.py    # writes docs/diagrams/*.svg, light and dark

Nothing is drawn that the code does not do. A model of a published size is traced without weights.
Each call of a module, of `rotate` and of `attend` is noted, and so is each addition to the residual
stream. What the family before does not have is drawn in another colour.
"""

import contextlib
import importlib
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from flax import nnx

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "diagrams"
sys.path.insert(0, str(ROOT))

# name -> (model file, checkpoint, the diagram that it is compared with)
DIAGRAMS = {
    "gpt2": ("gpt2", "openai-community/gpt2", None),
    "opt": ("opt", "facebook/opt-125m", "gpt2"),
    "llama": ("llama", "HuggingFaceTB/SmolLM2-135M", "opt"),
    "gemma": ("gemma", "google/gemma-3-270m", "llama"),
    "mistral": ("mistral", "mistralai/Mistral-7B-v0.1", "llama"),
    "mixtral": ("mistral", "mistralai/Mixtral-8x7B-v0.1", "mistral"),
    "qwen": ("qwen", "Qwen/Qwen3-0.6B-Base", "llama"),
}


def main():
    FOLDER.mkdir(exist_ok=True)
    for name, svg in draw_all().items():
        (FOLDER / f"{name}.svg").write_text(svg)
        print(f"docs/diagrams/{name}.svg")


def draw_all() -> dict[str, str]:
    """File name, without .svg -> its contents, for each family and theme."""
    families = {}
    files = {}
    for name, (file, checkpoint, before) in DIAGRAMS.items():
        families[name] = describe(importlib.import_module(file), checkpoint)
        known = families[before].kinds() if before else families[name].kinds()
        for theme in THEMES:
            files[f"{name}-{theme}"] = draw(families[name], known, before, THEMES[theme])
    return files


# --------------------------------------- What the model does --------------------------------------


@dataclass
class Event:
    """A call: of the module with this path, or of the function with this name."""

    name: str
    input: Any
    options: dict
    args: tuple
    result: Any = None


def trace(model_file, config):
    """Calls a model on five tokens -> (the model, without weights; its events in their order).

    Of a stack of experts, the model that is returned has the first one.
    """
    events = []

    def run():
        model = model_file.Model(config, rngs=nnx.Rngs(0))
        # Experts in their plain form, which calls the stack of them once.
        plain = patch.object(model_file, "is_sparse", return_value=False, create=True)
        with watched(model_file, model, events), plain:
            model.hidden(jnp.zeros((1, 5), int))

    jax.eval_shape(run)  # computes nothing, so that the largest model takes no memory
    model = nnx.eval_shape(lambda: model_file.Model(config, rngs=nnx.Rngs(0)))
    for _, module in list(nnx.iter_modules(model)):
        if hasattr(module, "experts"):
            module.experts = jax.eval_shape(first_of_stack, module.experts)
    return model, events


def first_of_stack(experts):
    return jax.tree.map(lambda param: param[0], experts)


class Paths(dict):
    """The path of each module, by its id."""

    def __init__(self):
        super().__init__()
        self.modules = []  # kept, so that no other module gets the id of one

    def add(self, module, *prefix: str):
        """Adds a module and all within it."""
        self.modules.append(module)
        for path, part in nnx.iter_modules(module):
            self[id(part)] = ".".join(map(str, [*prefix, *path]))


@contextlib.contextmanager
def watched(model_file, model, events: list):
    """Within it, all calls of modules of the model, of `rotate` and of `attend` become events."""
    paths = Paths()
    paths.add(model)
    running = []  # names of the calls that have not returned yet

    def path_of(module) -> str:
        if id(module) not in paths:  # the stack of experts, which jax.vmap copies
            paths.add(module, running[-1], "experts")
        return paths[id(module)]

    def noted(function, name_of):
        def call(*args, **options):
            name, inputs = name_of(args)
            event = Event(name, inputs[0], options, inputs)
            events.append(event)
            running.append(name)
            result = function(*args, **options)
            running.pop()
            event.result = result[0] if isinstance(result, tuple) else result
            return result

        return call

    saved = []
    for kind in {type(module) for _, module in nnx.iter_modules(model)}:
        is_called = any("__call__" in vars(base) for base in kind.__mro__[:-1])  # unlike a list
        if is_called and kind not in (type(model), nnx.Dropout):
            saved.append((kind, "__call__", lambda args: (path_of(args[0]), args[1:])))
    for name in ("rotate", "attend"):
        if hasattr(model_file, name):
            saved.append((model_file, name, lambda args, name=name: (name, args)))
    originals = [getattr(owner, name) for owner, name, _ in saved]
    for owner, name, name_of in saved:
        setattr(owner, name, noted(getattr(owner, name), name_of))
    try:
        yield
    finally:
        for (owner, name, _), original in zip(saved, originals, strict=True):
            setattr(owner, name, original)


# ------------------------------------ From calls to a description ---------------------------------


@dataclass(frozen=True)
class Box:
    """A part: its name in the code and the checkpoint, and facts about it, each a (text, kind).

    A kind says what a fact is without its sizes; it is new if the family before has none such.
    """

    name: str
    facts: tuple


@dataclass
class Family:
    """All that a diagram shows. A column is a list of boxes, one below the other."""

    title: str
    embeddings: list[Box] = field(default_factory=list)
    layers: int = 0
    layers_name: str = ""
    rows: list[list[list[Box]]] = field(default_factory=list)  # of a block: columns, from the left
    last: list[Box] = field(default_factory=list)  # after all blocks
    notes: list[tuple] = field(default_factory=list)  # facts about the whole model

    def kinds(self) -> set:
        """All kinds of facts."""
        boxes = [*self.embeddings, *self.last]
        for row in self.rows:
            for column in row:
                boxes += [box for box in column if box is not None]
        facts = [fact for box in boxes for fact in box.facts]
        return {kind for _, kind in [*facts, *self.notes]}


def describe(model_file, checkpoint: str) -> Family:
    """The Family of a published checkpoint."""
    config = model_file.PRESETS[checkpoint].config
    model, events = trace(model_file, config)
    names = [event.name for event in events]

    # The first block: its name ends in a number, as in h.0.
    first = next(i for i, name in enumerate(names) if name.rpartition(".")[2].isdigit())
    block = names[first]
    layers_name = block.rpartition(".")[0]
    family = Family(f"{model_file.__name__}.py: {checkpoint}")
    family.layers = len(module_at(model, layers_name))
    family.layers_name = layers_name

    context = getattr(config, "max_position_embeddings", None)
    is_scaled = events[first].input is not events[0].result
    is_scaled &= getattr(config, "embedding_multiplier", None) != 1  # as in a Llama
    family.embeddings = [embedding_box(model, event.name, context) for event in events[:first]]
    if first == 1 and is_scaled:
        scale = ("times √D", "scaled embedding")
        family.embeddings[0] = Box(names[0], (*family.embeddings[0].facts, scale))

    for parts in rows_of(events, block):
        columns = []
        for name in parts:
            role = "first in a row" if name == parts[0] else "last in a row"
            columns += columns_of(model, events, name, role)
        family.rows.append(columns)

    after = [name for name in names[first:] if not name.startswith((layers_name, *FUNCTIONS))]
    family.last = [norm_box(model, name, "last") for name in after]
    family.last.append(head_box(model, config, names[0]))
    has_bias = [m.bias is not None for _, m in nnx.iter_modules(model) if type(m) is nnx.Linear]
    if all(has_bias):
        family.notes = [("all projections have a bias", "bias")]
    else:
        family.notes = [("projections have no bias", "no bias")]
    return family


FUNCTIONS = ("rotate", "attend")


def module_at(model, path: str):
    """The module of a path such as layers.0.mlp."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def last_name(path: str) -> str:
    return path.rpartition(".")[2]


def rows_of(events, block: str) -> list[list[str]]:
    """The parts of a block by their paths, a list for each addition to the residual stream.

    A part that does not read what the part before it made reads the stream: an addition is between.
    """
    rows = []
    made = None
    for event in events:
        if event.name.rpartition(".")[0] != block:
            continue
        if made is None or event.input is not made:
            rows.append([])
        rows[-1].append(event.name)
        made = event.result
    return rows


def calls_within(events, path: str) -> list[Event]:
    """The calls that a part made: they follow its own, up to the first that is not its own."""
    names = [event.name for event in events]
    start = names.index(path) + 1
    end = start
    while end < len(names) and names[end].startswith((path + ".", *FUNCTIONS)):
        end += 1
    return events[start:end]


def columns_of(model, events, path: str, role: str) -> list[list[Box]]:
    """The columns of a part of a block: a norm, an attention, an MLP or a mixture of experts."""
    calls = calls_within(events, path)
    names = [call.name for call in calls]
    if not calls:
        return [[norm_box(model, path, role)]]
    if "attend" in names:
        return attention_columns(model, events, names)
    if any(".experts." in name for name in names):
        router = next(name for name in names if name.endswith(".gate"))
        chosen = module_at(model, path).per_token
        number = module_at(model, router).out_features
        facts = (("router: softmax", "router"), (f"{chosen} of {number} experts", "experts"))
        expert = [name for name in names if ".experts." in name]
        columns = mlp_columns(model, expert, f"{path}.experts")
        [output] = columns[-1]
        weighted = ("weighted sum", "weighted sum")
        columns[-1] = [Box(output.name, (*output.facts, weighted))]
        gate = Box(last_name(router), (*linear_box(model, router, "router").facts, *facts))
        return [[gate], *columns]
    return mlp_columns(model, names, path)


def attention_columns(model, events, names: list[str]) -> list[list[Box]]:
    """Projections, norms of queries and keys, rotations, `attend`, and the output."""
    at = names.index("attend")
    before = [name for name in names[:at] if name != "rotate"]
    norms = [name for name in before if name.endswith("_norm")]
    inputs = [name for name in before if name not in norms]

    kind = f"{len(inputs)} projections"
    columns = [[linear_box(model, name, kind) for name in inputs]]
    if norms:  # of queries and keys; values pass by
        boxes = [norm_box(model, name, "of queries and keys") for name in norms]
        columns.append([*boxes, None])
    if "rotate" in names:
        rotate = Box("rotate", (("RoPE", "RoPE"),))
        columns.append([rotate, rotate, None])
    columns.append([attend_box(events, module_at(model, inputs[0]).kernel.shape[0])])
    columns.append([linear_box(model, name, "output") for name in names[at + 1 :]])
    return columns


def attend_box(events, D: int) -> Box:
    """Heads, mask and soft-cap, of all calls of `attend`."""
    calls = [event for event in events if event.name == "attend"]
    q, k = calls[0].args[:2]
    H, K = q.shape[2], k.shape[2]
    facts = [(f"{H} heads of {q.shape[3]}", "heads")]
    if H * q.shape[3] != D:
        facts = [(f"{H} heads of {q.shape[3]}", "heads wider than D / H")]
    if K < H:
        facts.append((f"{K} KV head" + "s" * (K > 1), "grouped-query"))
    facts.append(("causal mask", "causal"))

    windows = [call.options.get("window") for call in calls]
    sizes = {size for size in windows if size is not None}
    for size in sizes:
        facts.append((f"window: {size:,}", "window"))
    if sizes and None in windows:
        number = len(windows) - windows.count(None)
        facts.append((f"in {number} of {len(windows)}", "window in some layers"))
    cap = calls[0].options.get("softcap")
    if cap is not None:
        facts.append((f"soft-cap: {cap:g}", "soft-cap"))
    return Box("attend", tuple(facts))


def mlp_columns(model, names: list[str], path: str) -> list[list[Box]]:
    """Projections to F, the activation, and the projection back to D."""
    *inputs, output = names
    mlp = module_at(model, path)
    activation = activation_of(mlp, module_at(model, inputs[0]).kernel.shape[0])
    gated = len(inputs) == 2
    is_expert = path.endswith(".experts")
    kind = "gated" if gated else "plain"
    if is_expert:
        kind = f"{kind} expert"
    facts = [(activation, activation)]
    if gated:
        facts = [(f"{activation}({last_name(inputs[0])})", activation)]
        facts.append((f"times {last_name(inputs[1])}", "gated"))
    if is_expert:
        facts.append(("in each expert", "experts"))
    return [
        [linear_box(model, name, kind) for name in inputs],
        [Box("", tuple(facts))],
        [linear_box(model, output, "output of experts" if is_expert else "output")],
    ]


def activation_of(mlp, D: int) -> str:
    """The activation of an MLP, by the operation in its program that no other has."""
    graphdef, state = nnx.split(mlp)
    x = jax.ShapeDtypeStruct((1, 1, D), jnp.float32)
    program = str(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x))
    operations = {" logistic ": "SiLU", " tanh ": "GELU", " erf": "GELU", " max ": "ReLU"}
    return next(name for operation, name in operations.items() if operation in program)


def embedding_box(model, path: str, context: int | None) -> Box:
    """A table: of tokens, which comes first, or of positions."""
    rows, width = module_at(model, path).embedding.shape
    kind = "positions" if "pos" in path or path == "wpe" else "tokens"
    facts = [(f"{rows:,} {kind}", kind), (f"× {width:,}", "width")]
    if kind == "positions" and context is not None and rows > context:
        facts.append((f"p is in row p + {rows - context}", "shifted positions"))
    return Box(path, tuple(facts))


def norm_box(model, path: str, role: str) -> Box:
    norm = type(module_at(model, path))
    text = norm.__name__
    facts = [(text, f"{text} {role}")]
    if not norm.__module__.startswith("flax"):
        facts.append(("times 1 + weight", "1 + weight"))  # gemma.py's own
    return Box(last_name(path), tuple(facts))


def linear_box(model, path: str, kind: str) -> Box:
    size_in, size_out = module_at(model, path).kernel.shape
    return Box(last_name(path), ((f"{size_in:,} → {size_out:,}", kind),))


def head_box(model, config, table: str) -> Box:
    """The head: a matrix of its own, or the token table."""
    if hasattr(model, "lm_head"):
        D, V = model.lm_head.kernel.shape
        return Box("lm_head", ((f"{D:,} → {V:,}", "own head"),))
    facts = [(f"is {table}", "tied head")]
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        facts.append((f"soft-cap: {cap:g}", "soft-cap of logits"))
    return Box("head", tuple(facts))


# -------------------------------------------- The drawing -----------------------------------------

THEMES = {
    "light": {
        "text": "#1f2328",
        "faint": "#59636e",
        "box": "#f6f8fa",
        "edge": "#afb8c1",
        "stream": "#0969da",
        "new": "#fff1e5",
        "new_edge": "#bc4c00",
    },
    "dark": {
        "text": "#e6edf3",
        "faint": "#9198a1",
        "box": "#151b23",
        "edge": "#4c545d",
        "stream": "#4493f8",
        "new": "#341a0a",
        "new_edge": "#f0883e",
    },
}
WIDTH = 120  # of a box, in pixels
GAP = 26  # between columns
LINE = 14  # height of a line of text
STREAM = 46  # where the residual stream runs down, from the left
LEFT = 92  # where the first column begins
LETTERS = 15  # of a name that fit a box


class Canvas:
    """The elements of an SVG, in the colours of a theme."""

    def __init__(self, theme: dict, known: set):
        self.theme = theme
        self.known = known
        self.parts = []
        self.width = 0

    def text(self, x, y, text, *, fill="text", size=11.5, anchor="start", mono=False, bold=False):
        family = "ui-monospace,Menlo,Consolas,monospace" if mono else "system-ui,sans-serif"
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{self.theme[fill]}" font-size="{size:g}"{weight} '
            f'font-family="{family}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def line(self, points: list[tuple], *, stroke="edge", width=1.4, arrow=True):
        end = f' marker-end="url(#{stroke})"' if arrow else ""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{self.theme[stroke]}" '
            f'stroke-width="{width:g}"{end}/>'
        )

    def frame(self, x, y, width, height, *, fill="none", stroke="edge", dashed=False):
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        fill = self.theme.get(fill, fill)
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'fill="{fill}" stroke="{self.theme[stroke]}"{dash}/>'
        )
        self.width = max(self.width, x + width)

    def plus(self, x, y):
        """An addition to the residual stream."""
        colour = self.theme["stream"]
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="{self.theme["box"]}" stroke="{colour}" '
            f'stroke-width="2"/><path d="M{x - 5:g} {y:g}h10M{x:g} {y - 5:g}v10" '
            f'stroke="{colour}" stroke-width="2"/>'
        )

    def box(self, box: Box, x, y):
        """A box with its top left corner there. What is new has another colour."""
        new = any(kind not in self.known for _, kind in box.facts)
        fill, stroke = ("new", "new_edge") if new else ("box", "edge")
        self.frame(x, y, WIDTH, height_of(box), fill=fill, stroke=stroke)
        y += 4
        for line in wrapped(box.name):
            y += LINE
            self.text(x + WIDTH / 2, y, line, anchor="middle", mono=True)
        for fact, kind in box.facts:
            y += LINE
            colour = "faint" if kind in self.known else "new_edge"
            self.text(x + WIDTH / 2, y, fact, anchor="middle", fill=colour)


def wrapped(name: str) -> list[str]:
    """A name in lines that fit a box, broken after underscores."""
    lines = [""]
    for part in name.replace("_", "_ ").split():
        if len(lines[-1]) + len(part) > LETTERS:
            lines.append("")
        lines[-1] += part
    return [line for line in lines if line]


def height_of(box: Box | None) -> int:
    if box is None:
        return 2 * LINE + 12
    return LINE * (len(wrapped(box.name)) + len(box.facts)) + 12


def draw(family: Family, known: set, before: str | None, theme: dict) -> str:
    """The diagram as SVG: the residual stream runs down, each part of a block reads it to the right
    and adds to it. known: kinds of facts that are not new."""
    canvas = Canvas(theme, known)
    canvas.text(16, 26, family.title, size=15, bold=True)
    y = 44
    if before is not None:
        canvas.frame(16, y, 12, 12, fill="new", stroke="new_edge")
        canvas.text(34, y + 10, f"not in the diagram of {before}", fill="faint")
        y += 24
    for text, kind in family.notes:
        canvas.text(16, y + 10, text, fill="faint" if kind in known else "new_edge")
        y += 24

    # The tables, whose rows add up to the residual stream.
    start = y + 24
    bottom = draw_boxes(canvas, family.embeddings, start, sign="+")
    canvas.text(STREAM, start + 4, "tokens", anchor="middle", fill="faint")
    middle = start + 28
    canvas.line([(STREAM, start + 10), (STREAM, middle), (LEFT - 4, middle)])
    entry = bottom + 22
    down = LEFT + WIDTH / 2
    points = [(down, bottom), (down, entry), (STREAM, entry)]
    canvas.line(points, stroke="stream", width=2.5, arrow=False)

    canvas.text(STREAM + 8, entry - 6, "residual stream", fill="stream")

    # A block: each row reads the stream, and adds to it below.
    top = entry + 18
    y = top + 34
    adds = []
    for row in family.rows:
        y = draw_row(canvas, row, y)
        adds.append(y)
        y += 24
    y += 4
    right = LEFT + max(len(row) for row in family.rows) * (WIDTH + GAP) - GAP + 16
    canvas.frame(14, top, right - 14, y - top, dashed=True)
    label = f"{family.layers} blocks, {family.layers_name}.0 to {family.layers_name}"
    label += f".{family.layers - 1}; the first is shown"
    canvas.text(LEFT, top + 18, label, fill="faint")

    # The last norm and the head.
    y += 26
    middle = y + 22
    canvas.line([(STREAM, entry), (STREAM, middle), (LEFT - 4, middle)], stroke="stream", width=2.5)
    for add in adds:
        canvas.plus(STREAM, add)
    bottom = draw_boxes(canvas, family.last, y, sign="→")
    end = LEFT + len(family.last) * (WIDTH + GAP)
    canvas.line([(end - GAP, middle), (end + 4, middle)])
    canvas.text(end + 10, middle + 4, "logits", fill="faint")
    return svg_of(canvas, bottom + 18, family.title)


def draw_boxes(canvas: Canvas, boxes: list[Box], y, sign: str) -> float:
    """Boxes in a line, with a plus or an arrow between them -> where the tallest ends."""
    for i, box in enumerate(boxes):
        x = LEFT + i * (WIDTH + GAP)
        canvas.box(box, x, y)
        if i > 0 and sign == "+":
            canvas.text(x - GAP / 2, y + 34, "+", anchor="middle", size=18)
        elif i > 0:
            canvas.line([(x - GAP, y + 22), (x - 2, y + 22)])
    return y + max(height_of(box) for box in boxes)


def draw_row(canvas: Canvas, columns: list[list], y) -> float:
    """Columns from left to right, from the stream and back -> where the result is added."""
    # Columns of as many boxes have them at the same heights, so that lines between them are level.
    slots = {}
    for column in columns:
        heights = [height_of(box) for box in column]
        known = slots.get(len(column), heights)
        slots[len(column)] = [max(pair) for pair in zip(known, heights, strict=True)]
    totals = {number: sum(slots[number]) + 10 * (number - 1) for number in slots}
    height = max(totals.values())
    middle = y + height / 2

    edge, leaving = STREAM, [middle]  # of the column on the left: its right side, and its lines
    for i, column in enumerate(columns):
        x = LEFT + i * (WIDTH + GAP)
        top = middle - totals[len(column)] / 2
        centres = []
        for box, slot in zip(column, slots[len(column)], strict=True):
            centres.append(top + slot / 2)
            if box is not None:
                canvas.box(box, x, centres[-1] - height_of(box) / 2)
            else:  # values pass by
                canvas.line([(x, centres[-1]), (x + WIDTH, centres[-1])], arrow=False)
            top += slot + 10
        connect(canvas, edge, leaving, x, centres, column)
        edge, leaving = x + WIDTH, centres

    add = y + height + 20
    turn = edge + 8
    points = [(edge, middle), (turn, middle), (turn, add), (STREAM + 11, add)]
    canvas.line(points, stroke="stream")
    return add


def connect(canvas: Canvas, left, starts: list, right, ends: list, column: list):
    """Arrows from the lines on the left to the boxes on the right.

    Each goes to its own box if there are as many, otherwise all go to all.
    """
    pairs = [(a, b) for a in starts for b in ends]
    if len(starts) == len(ends):
        pairs = list(zip(starts, ends, strict=True))
    for a, b in pairs:
        is_box = column[ends.index(b)] is not None
        bend = left + (right - left) / 2
        if left == STREAM:
            bend = left
        canvas.line([(left, a), (bend, a), (bend, b), (right - 2 * is_box, b)], arrow=is_box)


def svg_of(canvas: Canvas, height, title: str) -> str:
    """The whole file."""
    width = canvas.width + 16
    markers = ""
    for name in ("edge", "stream"):
        markers += (
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
            f'markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8z" '
            f'fill="{canvas.theme[name]}"/></marker>'
        )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<defs>{markers}</defs>",
        *canvas.parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
