"""Invalid documents with one fault each; a mark in the text shows the place where it must be reported."""

from __future__ import annotations

from dataclasses import dataclass

from invflow.registry import bijections, did_you_mean, priors

MARK = "§"
"""Precedes the place that the error must point at; it is not part of the document."""


@dataclass(frozen=True)
class Fault:
    """A document with one fault.

    Attributes:
        marked: its text, with the mark.
        path: the path that the error must carry.
        message: the exact message of the error.
        in_schema: whether a JSON schema can express the fault, so that an editor marks it too.
    """

    marked: str
    path: str
    message: str
    in_schema: bool = True

    @property
    def text(self) -> str:
        return self.marked.replace(MARK, "")

    @property
    def line(self) -> int:
        return self.marked.split(MARK)[0].count("\n") + 1

    @property
    def column(self) -> int:
        return len(self.marked.split(MARK)[0].rsplit("\n", maxsplit=1)[-1]) + 1


def document(*layers: str, shape: str = "[4, 4, 4]", more: str = "") -> str:
    """A spec with these layers, one per line: the first is at 4:5."""
    inside = ",\n    ".join(layers)
    return f'{{\n  "input": {{"shape": {shape}}},\n  "layers": [\n    {inside}\n  ]{more and ", "}{more}\n}}'


def after_split(layer: str, **more: str) -> str:
    return document('{"type": "split"}', layer, **more)


def coupling(net: str) -> str:
    return after_split(f'{{"type": "additive_coupling", "net": {net}}}')


def head(text: str, **more: str) -> str:
    return document('{"type": "psi", "block_size": 2}', more=f'"head": {text}', **more)


def training(text: str) -> str:
    return document('{"type": "psi", "block_size": 2}', more=f'\n  "training": {text}')


def checkpoint(text: str) -> str:
    return document('{"type": "psi", "block_size": 2}', more=f'\n  "checkpoint": {text}')


LAYERS = ", ".join(map(repr, sorted(bijections.registered())))
PRIORS = did_you_mean("zzz", set(priors.registered()))
PSI = '{"type": "psi", "block_size": 2}'
SHAPE = "a shape is a list of positive whole numbers without the batch, or a list of shapes"
DIGEST = "0" * 64
WEIGHTS = "weights-0123456789abcdef.safetensors"

SYNTAX = {
    "empty": Fault("§", "", "not JSON: the document is empty"),
    "no JSON": Fault("§hello", "", "not JSON: expected a value"),
    "ends early": Fault('{"input": {"shape": [4]§', "", "not JSON: the document ends too early"),
    "trailing comma": Fault('{\n  "layers": []§,\n}', "", "not JSON: an extra comma"),
    "trailing comma in a list": Fault('{"layers": [1§, ]}', "", "not JSON: an extra comma"),
    "missing comma": Fault(
        '{"name": "a"\n  §"layers": []}', "", "not JSON: expected a comma, or the end of the object or list"
    ),
    "missing colon": Fault('{"name" §3}', "", "not JSON: expected a colon after the key"),
    "single quotes": Fault("{§'input': 1}", "", "not JSON: strings and keys need double quotes"),
    "bare key": Fault("{§input: 1}", "", "not JSON: expected a key in double quotes"),
    "comment": Fault(
        '{\n  "name": "a",\n  §// why\n  "layers": []}', "", 'not JSON: comments are not allowed; use "note"'
    ),
    "open string": Fault('{"name": §"abc}', "", "not JSON: a string without a closing quote"),
    "line break in a string": Fault(
        '{"name": "a§\n"}', "", "not JSON: a line break or another control character inside a string"
    ),
    "unknown escape": Fault(
        '{"name": "C:§\\data"}', "", "not JSON: an unknown escape in a string; write a backslash twice"
    ),
    "text after the end": Fault(document() + "\n§}", "", "not JSON: unexpected text after the end of the document"),
}

TEXT = {
    "duplicate key": Fault(document(more='§"layers": []'), "layers", "duplicate key 'layers'", in_schema=False),
    "duplicate key in a layer": Fault(
        document('{"type": "psi", §"type": "split"}'), "layers.0.type", "duplicate key 'type'", in_schema=False
    ),
    "NaN": Fault(
        document('{"type": "psi", "block_size": §NaN}'),
        "layers.0.block_size",
        "NaN is not allowed in a spec",
        in_schema=False,
    ),
    "Infinity": Fault(
        training('{"optimizer": {"type": "sgd", "lr": §-Infinity}}'),
        "training.optimizer.lr",
        "-Infinity is not allowed in a spec",
        in_schema=False,
    ),
    "1e999": Fault(
        training('{"optimizer": {"type": "sgd", "lr": §1e999}}'),
        "training.optimizer.lr",
        "the number 1e999 is out of range",
        in_schema=False,
    ),
    "an integer beyond 2**53": Fault(
        document('{"type": "permute", "seed": §9007199254740993}'),
        "layers.0.seed",
        "the number 9007199254740993 is out of range",
        in_schema=False,
    ),
    "a thousand digits": Fault(
        document(shape=f"[4, §{'1' * 1000}]"),
        "input.shape.1",
        "the number 111111111111111111111111111... is out of range",
        in_schema=False,
    ),
    "half a character": Fault(
        document('{"type": "psi", "note": §"\\ud83d"}'),
        "layers.0.note",
        "the string contains half a character (a lone surrogate)",
        in_schema=False,
    ),
}

TOP_LEVEL = {
    "a list": Fault("§[]", "", "a spec is a JSON object, got []"),
    "a string": Fault('\n §"irevnet"', "", 'a spec is a JSON object, got "irevnet"'),
    "null": Fault("§null", "", "a spec is a JSON object, got null"),
    "no input": Fault('§{"layers": []}', "", "a spec needs 'input'"),
    "no layers": Fault('§{"input": {"shape": [4]}}', "", "a spec needs 'layers'"),
    "layers no list": Fault(
        '{"input": {"shape": [4]}, "layers": §{}}', "layers", "input should be a valid array, got {}"
    ),
    "unknown key": Fault(
        document(more='§"haed": {"type": "linear", "classes": 2}'),
        "haed",
        "unknown key 'haed' of a spec; did you mean 'head'?",
    ),
    "a reference as the document": Fault(
        document(more='§"$var": "x"'), "$var", "unknown key '$var' of a spec; did you mean 'vars'?"
    ),
    "name": Fault(document(more='"name": §3'), "name", "input should be a valid string, got 3"),
    "$schema": Fault(document(more='"$schema": §true'), "$schema", "input should be a valid string, got true"),
    "version too new": Fault(
        document(more='"spec_version": §3'),
        "spec_version",
        "spec_version 3 is newer than this invflow reads (up to 2); upgrade invflow",
    ),
    "version 0": Fault(
        document(more='"spec_version": §0'), "spec_version", "input should be greater than or equal to 1, got 0"
    ),
    "version as text": Fault(
        document(more='"spec_version": §"1"'), "spec_version", 'input should be a valid integer, got "1"'
    ),
    "version true": Fault(
        document(more='"spec_version": §true'), "spec_version", "input should be a valid integer, got true"
    ),
    "input no object": Fault('{"input": §4, "layers": []}', "input", "input should be an object, got 4"),
    "input without shape": Fault('{"input": §{}, "layers": []}', "input", "input needs 'shape'"),
    "unknown key of input": Fault(
        '{"input": {"shape": [4], §"context": [4]}, "layers": []}',
        "input.context",
        "unknown key 'context' of input; did you mean 'context_shape'?",
    ),
    "shape as text": Fault(document(shape='§"4"'), "input.shape", 'input should be a valid array, got "4"'),
    "shape with 0": Fault(document(shape="§[4, 0]"), "input.shape", f"{SHAPE}, got [4, 0]"),
    "shape with 4.5": Fault(document(shape="§[4.5]"), "input.shape", f"{SHAPE}, got [4.5]"),
    "shape with 4.0": Fault(document(shape="§[4.0]"), "input.shape", f"{SHAPE}, got [4.0]", in_schema=False),
    "shape with true": Fault(document(shape="§[true]"), "input.shape", f"{SHAPE}, got [true]"),
    "shape empty": Fault(document(shape="§[]"), "input.shape", "a shape needs 1 to 16 numbers, got []"),
    "shape mixed": Fault(document(shape="§[4, [3]]"), "input.shape", f"{SHAPE}, got [4, [3]]"),
    "shape of a pair empty": Fault(
        document(shape="§[[4], []]"), "input.shape", "a shape needs 1 to 16 numbers, got [[4], []]"
    ),
    "context shape with 0": Fault(
        '{"input": {"shape": [4], "context_shape": §[0]}, "layers": []}',
        "input.context_shape",
        "a shape is a list of positive whole numbers without the batch, got [0]",
    ),
    "context shape empty": Fault(
        '{"input": {"shape": [4], "context_shape": §[]}, "layers": []}',
        "input.context_shape",
        "a shape needs 1 to 16 numbers, got []",
    ),
}

LAYER = {
    "null": Fault(document("§null"), "layers.0", "expected a layer, an object with a type, got null"),
    "a tag alone": Fault(document('§"psi"'), "layers.0", 'expected a layer, an object with a type, got "psi"'),
    "a list": Fault(document("§[]"), "layers.0", "expected a layer, an object with a type, got []"),
    "no type": Fault(document('§{"block_size": 2}'), "layers.0", "expected a layer with a type, a string, got no type"),
    "type a number": Fault(
        document('§{"type": 3}'), "layers.0", "expected a layer with a type, a string, got the type 3"
    ),
    "unknown type, close": Fault(
        after_split('§{"type": "additive_copling"}'),
        "layers.1",
        "unknown layer type 'additive_copling'; did you mean 'additive_coupling'?",
    ),
    "unknown type": Fault(document('§{"type": "zzz"}'), "layers.0", f"unknown layer type 'zzz'; there is {LAYERS}"),
    "a net as a layer": Fault(document('§{"type": "conv"}'), "layers.0", "unknown layer type 'conv': it is a net"),
    "unknown key": Fault(
        document('{"type": "psi", §"blocksize": 2}'),
        "layers.0.blocksize",
        "unknown key 'blocksize' of psi; did you mean 'block_size'?",
    ),
    "unknown key, nothing close": Fault(
        document('{"type": "psi", §"x": 2}'),
        "layers.0.x",
        "unknown key 'x' of psi; there is 'block_size', 'context', 'layout', 'note'",
    ),
    "note no string": Fault(
        document('{"type": "psi", "block_size": 2, "note": §3}'), "layers.0.note", "a note is a string, got 3"
    ),
    "true for a whole number": Fault(
        document('{"type": "psi", "block_size": §true}'),
        "layers.0.block_size",
        "input should be a valid integer, got true",
    ),
    "2.0 for a whole number": Fault(
        document('{"type": "psi", "block_size": §2.0}'),
        "layers.0.block_size",
        "input should be a valid integer, got 2.0",
        in_schema=False,
    ),
    "a string for a whole number": Fault(
        document('{"type": "psi", "block_size": §"2"}'),
        "layers.0.block_size",
        'input should be a valid integer, got "2"',
    ),
    "null for a whole number": Fault(
        document('{"type": "psi", "block_size": §null}'),
        "layers.0.block_size",
        "input should be a valid integer, got null",
    ),
    "out of range": Fault(
        document('{"type": "psi", "block_size": §0}'), "layers.0.block_size", "input should be greater than 0, got 0"
    ),
    "none of the literals": Fault(
        document('{"type": "psi", "layout": §"chanel"}'),
        "layers.0.layout",
        "input should be 'block' or 'channel', got \"chanel\"",
    ),
    "pair too short": Fault(
        document('{"type": "split", "sizes": §[4]}'), "layers.0.sizes", "expected 2 items, got [4]"
    ),
    "pair empty": Fault(document('{"type": "split", "sizes": §[]}'), "layers.0.sizes", "expected 2 items, got []"),
    "pair too long": Fault(
        document('{"type": "split", "sizes": §[1, 1, 2]}'), "layers.0.sizes", "expected at most 2 items, got 3"
    ),
    "item out of range": Fault(
        document('{"type": "permute", "order": [1, §-1]}'),
        "layers.0.order.1",
        "input should be greater than or equal to 0, got -1",
    ),
    "list empty": Fault(
        document('{"type": "permute", "order": §[]}'), "layers.0.order", "expected at least 1 item, got 0"
    ),
    "fields that exclude each other": Fault(
        document('§{"type": "permute", "order": [0], "seed": 1}'),
        "layers.0",
        "permute expects either an order or a seed, not both",
        in_schema=False,
    ),
    "no permutation": Fault(
        document('§{"type": "permute", "order": [0, 0, 1, 2]}'),
        "layers.0",
        "permute expects an order that holds each of 0 .. 3 once, got [0, 0, 1, 2]",
        in_schema=False,
    ),
    "inner layer missing": Fault(document('§{"type": "inverse"}'), "layers.0", "inverse needs 'layer'"),
    "inner layer null": Fault(
        document('{"type": "inverse", "layer": §null}'),
        "layers.0.layer",
        "expected a layer, an object with a type, got null",
    ),
    "inner layer a list": Fault(
        after_split(f'{{"type": "each", "layer": §[{PSI}]}}'),
        "layers.1.layer",
        f"expected a layer, an object with a type, got [{PSI}]",
    ),
    "inner layers no list": Fault(
        document('{"type": "sequential", "layers": §{}}'), "layers.0.layers", "expected a list of layers, got {}"
    ),
    "fault deep inside": Fault(
        document('{"type": "inverse", "layer": {"type": "sequential", "layers": [{"type": "psi", "layout": §1}]}}'),
        "layers.0.layer.layers.0.layout",
        "input should be 'block' or 'channel', got 1",
    ),
}

NET = {
    "missing": Fault(after_split('§{"type": "additive_coupling"}'), "layers.1", "additive_coupling needs 'net'"),
    "null": Fault(coupling("§null"), "layers.1.net", "expected a net, an object with a type, got null"),
    "unknown type": Fault(
        coupling('§{"type": "cnov"}'), "layers.1.net", "unknown net type 'cnov'; did you mean 'conv'?"
    ),
    "a layer as a net": Fault(coupling(f"§{PSI}"), "layers.1.net", "unknown net type 'psi': it is a layer"),
    "even kernel": Fault(
        coupling('{"type": "conv", "kernel_size": §4}'),
        "layers.1.net.kernel_size",
        "input should be odd, so that the padding keeps height and width, got 4",
    ),
    "negative kernel": Fault(
        coupling('{"type": "conv", "kernel_size": §-3}'),
        "layers.1.net.kernel_size",
        "input should be greater than 0, got -3",
    ),
    "hidden no list": Fault(
        coupling('{"type": "conv", "hidden": §16}'), "layers.1.net.hidden", "input should be a valid array, got 16"
    ),
    "hidden with 0": Fault(
        coupling('{"type": "conv", "hidden": [8, §0]}'),
        "layers.1.net.hidden.1",
        "input should be greater than 0, got 0",
    ),
    "hidden too long": Fault(
        coupling(f'{{"type": "conv", "hidden": §{[1] * 101}}}'),
        "layers.1.net.hidden",
        "expected at most 100 items, got 101",
    ),
    "activation": Fault(
        coupling('{"type": "mlp", "activation": §"rleu"}'),
        "layers.1.net.activation",
        "input should be 'relu', 'leaky_relu', 'elu', 'gelu', 'silu', 'softplus', 'tanh' or 'sigmoid', got \"rleu\"",
    ),
    "norm": Fault(
        coupling('{"type": "conv", "norm": §"layer"}'), "layers.1.net.norm", "input should be 'batch', got \"layer\""
    ),
    "1 for true": Fault(
        coupling('{"type": "conv", "final_activation": §1}'),
        "layers.1.net.final_activation",
        "input should be a valid boolean, got 1",
    ),
    "unknown key": Fault(
        coupling('{"type": "conv", §"kernel": 3}'),
        "layers.1.net.kernel",
        "unknown key 'kernel' of conv; did you mean 'kernel_size'?",
    ),
    "weights too large for any machine": Fault(
        coupling('§{"type": "conv", "kernel_size": 2147483649}'),
        "layers.1.net",
        "conv cannot be made from these fields: "
        "Storage size calculation overflowed with sizes=[2, 2, 2147483649, 2147483649]",
        in_schema=False,
    ),
}

HEAD = {
    "no object": Fault(head('§"linear"'), "head", 'expected a head, an object with a type, got "linear"'),
    "unknown type": Fault(
        head('§{"type": "liner", "classes": 2}'), "head", "unknown head type 'liner'; did you mean 'linear'?"
    ),
    "missing field": Fault(head('§{"type": "linear"}'), "head", "linear needs 'classes'"),
    "unknown key": Fault(
        head('{"type": "convnet", "classes": 2, "hidden": [3], §"kernel": 3}'),
        "head.kernel",
        "unknown key 'kernel' of convnet; did you mean 'kernel_size'?",
    ),
    "one class": Fault(
        head('{"type": "linear", "classes": §1}'), "head.classes", "input should be greater than or equal to 2, got 1"
    ),
    "hidden empty": Fault(
        head('{"type": "convnet", "classes": 2, "hidden": §[]}'), "head.hidden", "expected at least 1 item, got 0"
    ),
    "convnet on vectors": Fault(
        document('{"type": "split"}', shape="[4]", more='"head": §{"type": "convnet", "classes": 2, "hidden": [3]}'),
        "head",
        "the convnet head expects (channels, height, width), got ((2,), (2,))",
        in_schema=False,
    ),
    "bayes head without a mixture": Fault(
        head('§{"type": "bayes"}, "prior": {"type": "standard_normal"}'),
        "head",
        'a bayes head expects a gaussian_mixture prior with a component for each class, and without "by"',
        in_schema=False,
    ),
    "unknown prior": Fault(document(more='"prior": §{"type": "zzz"}'), "prior", f"unknown prior type 'zzz'{PRIORS}"),
}

SHAPES = {
    "psi that does not divide": Fault(
        document('§{"type": "psi", "block_size": 3}'),
        "layers.0",
        "psi with block_size 3 expects a height and a width that 3 divides, got 4 x 4",
        in_schema=False,
    ),
    "psi on vectors": Fault(
        document(f"§{PSI}", shape="[4]"),
        "layers.0",
        "psi expects a shape (channels, length), (channels, height, width) or (channels, depth, height, width) besides "
        "the batch, got (4,)",
        in_schema=False,
    ),
    "split of one channel": Fault(
        document('§{"type": "split"}', shape="[1, 4, 4]"),
        "layers.0",
        "split expects at least 2 channels along dim 1 to make two parts of, got 1 in (1, 4, 4); put a psi before it",
        in_schema=False,
    ),
    "split sizes": Fault(
        document('§{"type": "split", "sizes": [1, 1]}'),
        "layers.0",
        "split with sizes [1, 1] expects 2 along dim 1, got 4 in (4, 4, 4)",
        in_schema=False,
    ),
    "split of a pair": Fault(
        after_split('§{"type": "split"}'),
        "layers.1",
        "split expects one tensor, got a tuple state of shape ((2, 4, 4), (2, 4, 4)); put a merge or an each before",
        in_schema=False,
    ),
    "merge of a tensor": Fault(
        document('§{"type": "merge"}'),
        "layers.0",
        "merge expects a pair of states, got shape (4, 4, 4); put a split before",
        in_schema=False,
    ),
    "coupling on a tensor": Fault(
        document('§{"type": "additive_coupling", "net": {"type": "conv"}}'),
        "layers.0",
        "additive_coupling expects a pair of states, got shape (4, 4, 4); put a split before",
        in_schema=False,
    ),
    "conv on vectors": Fault(
        document('{"type": "split"}', '{"type": "additive_coupling", "net": §{"type": "conv"}}', shape="[4]"),
        "layers.1.net",
        "conv expects a shape (channels, length), (channels, height, width) or (channels, depth, height, width) "
        "besides the batch, got (2,)",
        in_schema=False,
    ),
    "each on a tensor": Fault(
        document(f'§{{"type": "each", "layer": {PSI}}}'),
        "layers.0",
        "each expects a tuple state, got one tensor; use the layer without each, or put a split before it",
        in_schema=False,
    ),
    "inverse psi": Fault(
        document(f'{{"type": "inverse", "layer": §{PSI}}}', shape="[3, 4, 4]"),
        "layers.0.layer",
        "the inverse of psi with block_size 2 expects channels that 4 divides, got 3",
        in_schema=False,
    ),
    "permute by an unknown name": Fault(
        document('{"type": "permute", "order": §"revers"}'),
        "layers.0.order",
        "input should be 'reverse' or 'swap', got \"revers\"",
    ),
    "permute by a name and a seed": Fault(
        document('§{"type": "permute", "order": "swap", "seed": 1}'),
        "layers.0",
        "permute expects either an order or a seed, not both",
        in_schema=False,
    ),
    "stripes of one row": Fault(
        document('§{"type": "stripes"}', shape="[4, 1, 4]"),
        "layers.0",
        "stripes along dim 2 expects at least 2 indices there, got (4, 1, 4)",
        in_schema=False,
    ),
    "stripes of a vector": Fault(
        document('§{"type": "stripes"}', shape="[4]"),
        "layers.0",
        "stripes along dim 2 expects at least 2 indices there, got (4,)",
        in_schema=False,
    ),
    "checkerboard of an odd width": Fault(
        document('§{"type": "checkerboard"}', shape="[1, 4, 3]"),
        "layers.0",
        "checkerboard expects an even number of positions along the last dim, got (1, 4, 3)",
        in_schema=False,
    ),
    "halves of another split": Fault(
        after_split('{"type": "inverse", "layer": §{"type": "checkerboard"}}', shape="[5, 4, 4]"),
        "layers.1.layer",
        "the inverse of checkerboard expects the halves of one tensor, that of even indices first, got "
        "((2, 4, 4), (3, 4, 4))",
        in_schema=False,
    ),
    "reshape to other numbers": Fault(
        document('§{"type": "reshape", "to": [3, -1]}', shape="[4, 4, 4]"),
        "layers.0",
        "reshape to [3, -1] expects as many numbers in the state, got (4, 4, 4)",
        in_schema=False,
    ),
    "reshape to an extent of zero": Fault(
        document('§{"type": "reshape", "to": [0, 4]}'),
        "layers.0",
        "reshape expects positive extents, at most one of them -1, got [0, 4]",
    ),
    "transpose of other dimensions": Fault(
        document('§{"type": "transpose", "order": [2, 1]}', shape="[4, 4, 4]"),
        "layers.0",
        "transpose expects a shape of 2 dimensions besides the batch, got (4, 4, 4)",
        in_schema=False,
    ),
    "transpose without an order of dimensions": Fault(
        document('§{"type": "transpose", "order": [1, 1]}', shape="[4, 4]"),
        "layers.0",
        "transpose expects an order that holds each of 1 .. 2 once, got [1, 1]",
        in_schema=False,
    ),
    "permute of other channels": Fault(
        document('§{"type": "permute", "order": [1, 0]}'),
        "layers.0",
        "permute expects 2 channels, got 4 in (4, 4, 4)",
        in_schema=False,
    ),
    "inside a sequential": Fault(
        document(f'{{"type": "sequential", "layers": [{PSI}, {PSI}, §{PSI}]}}'),
        "layers.0.layers.2",
        "psi with block_size 2 expects a height and a width that 2 divides, got 1 x 1",
        in_schema=False,
    ),
    "context of another size": Fault(
        '{"input": {"shape": [4, 4, 4], "context_shape": [2, 3, 3]}, "layers": [\n'
        '  {"type": "split"},\n  {"type": "additive_coupling", "net": §{"type": "conv"}}]}',
        "layers.1.net",
        "conv expects a context (features,) or (channels, 4, 4), or at positions of which each is a multiple or a "
        "divisor of these, got (2, 3, 3)",
        in_schema=False,
    ),
    "inside a repeat": Fault(
        document(f'{{"type": "repeat", "times": 4, "layers": [\n      §{PSI}]}}'),
        "layers.0.layers.0",
        "psi with block_size 2 expects a height and a width that 2 divides, got 1 x 1 (iteration 3 of 4)",
        in_schema=False,
    ),
    "inside two repeats": Fault(
        document(f'{{"type": "repeat", "times": 2, "layers": [{{"type": "repeat", "times": 2, "layers": [§{PSI}]}}]}}'),
        "layers.0.layers.0.layers.0",
        "psi with block_size 2 expects a height and a width that 2 divides, got 1 x 1 (iteration 2 of 2, 1 of 2)",
        in_schema=False,
    ),
}

REPEAT = {
    "0 times": Fault(
        document(f'{{"type": "repeat", "times": §0, "layers": [{PSI}]}}'),
        "layers.0.times",
        "repeat expects a whole number of times, 1 or more, got 0",
    ),
    "true times": Fault(
        document(f'{{"type": "repeat", "times": §true, "layers": [{PSI}]}}'),
        "layers.0.times",
        "repeat expects a whole number of times, 1 or more, got true",
    ),
    "2.0 times": Fault(
        document(f'{{"type": "repeat", "times": §2.0, "layers": [{PSI}]}}'),
        "layers.0.times",
        "repeat expects a whole number of times, 1 or more, got 2.0",
        in_schema=False,
    ),
    "times missing": Fault(document(f'§{{"type": "repeat", "layers": [{PSI}]}}'), "layers.0", "repeat needs 'times'"),
    "layers missing": Fault(
        document('§{"type": "repeat", "times": 2}'),
        "layers.0",
        "repeat needs 'layers', a list of at least one layer",
    ),
    "layers empty": Fault(
        document('{"type": "repeat", "times": 2, "layers": §[]}'),
        "layers.0.layers",
        "repeat needs 'layers', a list of at least one layer",
    ),
    "unknown key": Fault(
        document(f'{{"type": "repeat", "times": 1, §"layer": {PSI}, "layers": [{PSI}]}}'),
        "layers.0.layer",
        "unknown key 'layer' of repeat; did you mean 'layers'?",
    ),
    "note no string": Fault(
        document(f'{{"type": "repeat", "times": 1, "note": §1, "layers": [{PSI}]}}'),
        "layers.0.note",
        "a note is a string, got 1",
    ),
    "with no object": Fault(
        document(f'{{"type": "repeat", "times": 1, "with": §[1], "layers": [{PSI}]}}'),
        "layers.0.with",
        "with expects an object of lists, got [1]",
    ),
    "with no list": Fault(
        document(f'{{"type": "repeat", "times": 1, "with": {{"b": §1}}, "layers": [{PSI}]}}'),
        "layers.0.with.b",
        "with expects a list, one item per iteration, got 1",
    ),
    "with of another length": Fault(
        document(f'{{"type": "repeat", "times": 2, "with": {{"b": §[1]}}, "layers": [{PSI}]}}'),
        "layers.0.with.b",
        "with expects a list of 2 items, one per iteration, got 1",
        in_schema=False,
    ),
    "with of another length in one iteration": Fault(
        document(
            '{"type": "repeat", "times": 2, "with": {"n": [1, 2]}, "layers": [\n'
            f'      {{"type": "repeat", "times": {{"$item": "n"}}, "with": {{"b": §[2]}}, "layers": [{PSI}]}}]}}'
        ),
        "layers.0.layers.0.with.b",
        "with expects a list of 2 items, one per iteration, got 1 (iteration 2 of 2)",
        in_schema=False,
    ),
    "repeat inside an item": Fault(
        document(
            f'{{"type": "repeat", "times": 1, "with": {{"b": [§{{"type": "repeat", "times": 2, "layers": [{PSI}]}}]}}, '
            '"layers": [{"$item": "b"}]}'
        ),
        "layers.0.with.b.0",
        "an item of with cannot hold a repeat; put the repeat where the item is used",
        in_schema=False,
    ),
    "unknown item": Fault(
        document(
            '{"type": "repeat", "times": 2, "with": {"block": [1, 2]}, "layers": [\n'
            '      {"type": "psi", "block_size": §{"$item": "blocks"}}]}'
        ),
        "layers.0.layers.0.block_size",
        "$item names \"blocks\", which is not in the with of an enclosing repeat; did you mean 'block'?",
        in_schema=False,
    ),
    "item outside": Fault(
        document('{"type": "psi", "block_size": §{"$item": "b"}}'),
        "layers.0.block_size",
        '$item names "b", which is not in the with of an enclosing repeat',
        in_schema=False,
    ),
    "unknown item as times": Fault(
        document(f'{{"type": "repeat", "times": §{{"$item": "n"}}, "layers": [{PSI}]}}'),
        "layers.0.times",
        '$item names "n", which is not in the with of an enclosing repeat',
        in_schema=False,
    ),
    "unknown variable": Fault(
        document('{"type": "psi", "block_size": §{"$var": "blok"}}', more='"vars": {"block": 2}'),
        "layers.0.block_size",
        "$var names \"blok\", which is not in vars; did you mean 'block'?",
        in_schema=False,
    ),
    "a reference with other keys": Fault(
        document('{"type": "psi", "block_size": §{"$var": "b", "default": 2}}', more='"vars": {"b": 2}'),
        "layers.0.block_size",
        '$var must be the only key of its object, got {"$var": "b", "default": 2}',
    ),
    "a reference to a number": Fault(
        document('{"type": "psi", "block_size": §{"$var": 1}}', more='"vars": {"b": 2}'),
        "layers.0.block_size",
        "$var names 1, which is not in vars; there is 'b'",
    ),
    "vars no object": Fault(document(more='"vars": §[1]'), "vars", "vars expects an object, got [1]"),
    "a variable that refers": Fault(
        document(more='"vars": {"a": 1, "b": §{"$var": "a"}}'),
        "vars.b",
        "a variable must be a constant, without repeat or reference",
        in_schema=False,
    ),
    "wrong value of a variable": Fault(
        document('{"type": "psi", "block_size": §{"$var": "b"}}', more='"vars": {"b": 0}'),
        "layers.0.block_size",
        "input should be greater than 0, got 0",
        in_schema=False,
    ),
    "wrong value of an item": Fault(
        document(
            '{"type": "repeat", "times": 3, "with": {"b": [2, "2", 1]}, "layers": [\n'
            '      {"type": "psi", "block_size": §{"$item": "b"}}]}'
        ),
        "layers.0.layers.0.block_size",
        'input should be a valid integer, got "2" (iteration 2 of 3)',
        in_schema=False,
    ),
    "fault inside an item": Fault(
        document(
            f'{{"type": "repeat", "times": 2, "with": {{"b": [{PSI}, {{"type": "psi", "size": 1}}]}}, '
            '"layers": [§{"$item": "b"}]}'
        ),
        "layers.0.layers.0",
        "unknown key 'size' of psi; there is 'block_size', 'context', 'layout', 'note' (iteration 2 of 2)",
        in_schema=False,
    ),
    "repeat where one layer stands": Fault(
        document(f'{{"type": "inverse", "layer": §{{"type": "repeat", "times": 2, "layers": [{PSI}]}}}}'),
        "layers.0.layer",
        'repeat is not a layer itself: use it in a list of layers, such as that of a {"type": "sequential"}',
    ),
    "repeat as a net": Fault(
        coupling(f'§{{"type": "repeat", "times": 2, "layers": [{PSI}]}}'),
        "layers.1.net",
        "repeat is not a net itself: use it in a list of layers",
    ),
    "the same fault in every iteration": Fault(
        document('{"type": "repeat", "times": 3, "layers": [{"type": "psi", "layout": §"rows"}]}'),
        "layers.0.layers.0.layout",
        "input should be 'block' or 'channel', got \"rows\"",
    ),
}

TRAINING = {
    "no object": Fault(training('§"long"'), "training", 'input should be an object, got "long"'),
    "unknown key": Fault(
        training('{§"epoch": 3}'), "training.epoch", "unknown key 'epoch' of training; did you mean 'epochs'?"
    ),
    "batch size 0": Fault(
        training('{"batch_size": §0}'), "training.batch_size", "input should be greater than 0, got 0"
    ),
    "data set": Fault(
        training('{"data": §{"name": "cifar"}}'),
        "training.data",
        "unknown data set 'cifar'; did you mean 'cifar10'?",
    ),
    "noise of images": Fault(
        training('{"data": {"name": "mnist", §"noise": 0.1}}'),
        "training.data.noise",
        "unknown key 'noise' of mnist; did you mean 'note'?",
    ),
    "noise of the wrong type": Fault(
        training('{"data": {"name": "moons", "noise": §"much"}}'),
        "training.data.noise",
        'input should be a valid number, got "much"',
    ),
    "steps 0": Fault(training('{"steps": §0}'), "training.steps", "input should be greater than 0, got 0"),
    "steps and epochs": Fault(
        training('{"epochs": §3, "steps": 100}'),
        "training.epochs",
        "expected either epochs or steps, got 3",
        in_schema=False,
    ),
    "no length": Fault(
        training('{"epochs": §null}'),
        "training.epochs",
        "expected either epochs or steps, got null",
        in_schema=False,
    ),
    "milestones out of order": Fault(
        training('{"schedule": {"type": "multi_step", "milestones": §[4, 2]}}'),
        "training.schedule.milestones",
        "milestones are expected in increasing order, got [4, 2]",
        in_schema=False,
    ),
    "a warm-up of one_cycle": Fault(
        training('{"schedule": {"type": "one_cycle"}, "warmup": §10}'),
        "training.warmup",
        "one_cycle has a warm-up of its own, in the schedule: leave this one out, got 10",
        in_schema=False,
    ),
    "training size 0": Fault(
        training('{"data": {"train_size": §0}}'), "training.data.train_size", "input should be greater than 0, got 0"
    ),
    "clipping to nothing": Fault(
        training('{"clip_gradient": §0}'), "training.clip_gradient", "input should be greater than 0, got 0"
    ),
    "augmentation": Fault(
        training('{"data": {"augmentation": {§"affin": {}}}}'),
        "training.data.augmentation.affin",
        "unknown key 'affin' of augmentation; did you mean 'affine'?",
    ),
    "affine scale": Fault(
        training('{"data": {"augmentation": {"affine": {"scale": [§0, 1]}}}}'),
        "training.data.augmentation.affine.scale.0",
        "input should be greater than or equal to 0.01, got 0",
    ),
    "optimizer no object": Fault(
        training('{"optimizer": §"sgd"}'), "training.optimizer", 'input should be an object, got "sgd"'
    ),
    "optimizer without type": Fault(
        training('{"optimizer": §{"lr": 0.1}}'), "training.optimizer", "optimizer needs 'type'"
    ),
    "unknown optimizer": Fault(
        training('{"optimizer": §{"type": "sdg", "lr": 0.1}}'),
        "training.optimizer",
        "unknown optimizer type 'sdg'; did you mean 'sgd'?",
    ),
    "learning rate missing": Fault(training('{"optimizer": §{"type": "sgd"}}'), "training.optimizer", "sgd needs 'lr'"),
    "learning rate as text": Fault(
        training('{"optimizer": {"type": "sgd", "lr": §"0.1"}}'),
        "training.optimizer.lr",
        'input should be a valid number, got "0.1"',
    ),
    "momentum": Fault(
        training('{"optimizer": {"type": "sgd", "lr": 0.1, "momentum": §1.5}}'),
        "training.optimizer.momentum",
        "input should be less than 1, got 1.5",
    ),
    "one beta": Fault(
        training('{"optimizer": {"type": "adam", "betas": §[0.9]}}'),
        "training.optimizer.betas",
        "expected 2 items, got [0.9]",
    ),
    "unknown key of an optimizer": Fault(
        training('{"optimizer": {"type": "adam", §"momentum": 0.9}}'),
        "training.optimizer.momentum",
        "unknown key 'momentum' of adam; there is 'betas', 'lr', 'type', 'weight_decay'",
    ),
    "schedule": Fault(
        training('{"schedule": {"type": "one_cycle", "warmup": §0}}'),
        "training.schedule.warmup",
        "input should be greater than 0, got 0",
    ),
}

CHECKPOINT = {
    "no object": Fault(checkpoint("§true"), "checkpoint", "input should be an object, got true"),
    "a path outside": Fault(
        checkpoint(f'{{"weights": §"../../etc/passwd", "digest": "{DIGEST}", "hash": "{DIGEST}"}}'),
        "checkpoint.weights",
        "string should match pattern '^weights-[0-9a-f]{16}\\.safetensors$', got \"../../etc/passwd\"",
    ),
    "digest too short": Fault(
        checkpoint(f'{{"weights": "{WEIGHTS}", "digest": §"00", "hash": "{DIGEST}"}}'),
        "checkpoint.digest",
        "string should match pattern '^[0-9a-f]{64}$', got \"00\"",
    ),
    "hash missing": Fault(
        checkpoint(f'§{{"weights": "{WEIGHTS}", "digest": "{DIGEST}"}}'), "checkpoint", "checkpoint needs 'hash'"
    ),
    "unknown key": Fault(
        checkpoint(f'{{"weights": "{WEIGHTS}", "digest": "{DIGEST}", "hash": "{DIGEST}", §"epoch": 3}}'),
        "checkpoint.epoch",
        "unknown key 'epoch' of checkpoint; there is 'digest', 'hash', 'weights'",
    ),
}

LIMITS = {
    "depth": Fault(
        document(more='"vars": {"a": ' + "[" * 31 + "§[1]" + "]" * 31 + "}"),
        "vars.a" + ".0" * 31,
        "objects and lists are nested deeper than the limit of 32",
        in_schema=False,
    ),
    "far too deep": Fault("§" + "[" * 100_000, "", "the document is nested too deeply to be read", in_schema=False),
    "times": Fault(
        document(f'{{"type": "repeat", "times": §1000000000, "layers": [{PSI}]}}'),
        "layers.0.times",
        "repeat 1000000000 times makes more layers than the limit of 10000",
        in_schema=False,
    ),
    "layers": Fault(
        document(
            f'{{"type": "repeat", "times": 101, "layers": [{{"type": "repeat", "times": 100, "layers": [§{PSI}]}}]}}'
        ),
        "layers.0.layers.0.layers.0",
        "more layers than the limit of 10000 once every repeat is expanded",
        in_schema=False,
    ),
    "values": Fault(
        document(
            '{"type": "repeat", "times": 5000, "layers": [{"type": "permute", "order": §{"$var": "long"}}]}',
            more=f'"vars": {{"long": {[0] * 500}}}',
        ),
        "layers.0.layers.0.order",
        "more than the limit of 1000000 values once everything is expanded",
        in_schema=False,
    ),
    "text through the back door": Fault(
        document(
            '{"type": "repeat", "times": 5000, "layers": [{"type": "psi", "note": §{"$var": "long"}}]}',
            more=f'"vars": {{"long": "{"x" * 10_000}"}}',
        ),
        "layers.0.layers.0.note",
        "more than the limit of 1000000 values once everything is expanded",
        in_schema=False,
    ),
    "keys through the back door": Fault(
        document(
            '{"type": "repeat", "times": 5000, "layers": [\n'
            f'      §{{"type": "psi", "layout": {{"$var": "layout"}}, "{"x" * 10_000}": 1}}]}}',
            more='"vars": {"layout": "block"}',
        ),
        "layers.0.layers.0",
        "more than the limit of 1000000 values once everything is expanded",
    ),
    "iterations that make no layer": Fault(
        document(
            '{"type": "repeat", "times": 10000, "layers": [' * 8
            + '{"type": "repeat", "times": 1, "layers": §[]}'
            + "]}" * 8
        ),
        ".".join(["layers.0"] * 9) + ".layers",
        "repeat needs 'layers', a list of at least one layer",
    ),
    "operations of a random order": Fault(
        document('§{"type": "permute", "seed": 0}', shape="[67108864]"),
        "layers.0",
        "building takes 268439466000 operations up to here, the limit is 100000000000",
        in_schema=False,
    ),
    "operations of factorisations": Fault(
        document('{"type": "repeat", "times": 30, "layers": [§{"type": "linear_1x1"}]}', shape="[3000]"),
        "layers.0.layers.0",
        "building takes 108048050000 operations up to here, the limit is 100000000000 (iteration 4 of 30)",
        in_schema=False,
    ),
    "operations of modules": Fault(
        document(
            '{"type": "split"}',
            '{"type": "repeat", "times": 400, "layers": [§{"type": "additive_coupling", "net": {"type": "mlp", '
            f'"hidden": {[1] * 100}}}}}]}}',
            shape="[2]",
        ),
        "layers.1.layers.0",
        "building takes 100444510000 operations up to here, the limit is 100000000000 (iteration 124 of 400)",
        in_schema=False,
    ),
    "parameters": Fault(
        document(
            '{"type": "split"}',
            '§{"type": "additive_coupling", "net": {"type": "mlp", "hidden": [1000000]}}',
            shape="[4000]",
        ),
        "layers.1",
        "4001002000 parameters up to here, the limit is 1000000000",
        in_schema=False,
    ),
    "parameters of the head": Fault(
        document(shape="[1000000]", more='"head": §{"type": "linear", "classes": 10000}'),
        "head",
        "10000010000 parameters up to here, the limit is 1000000000",
        in_schema=False,
    ),
    "state": Fault(
        document(shape="§[1048576, 1024]"),
        "input.shape",
        "a state of shape (1048576, 1024) holds 1073741824 numbers, the limit is 268435456",
        in_schema=False,
    ),
}

FAULTS: dict[str, Fault] = {
    f"{group}: {name}": fault
    for group, faults in {
        "syntax": SYNTAX,
        "text": TEXT,
        "top level": TOP_LEVEL,
        "layer": LAYER,
        "net": NET,
        "head": HEAD,
        "shapes": SHAPES,
        "repeat": REPEAT,
        "training": TRAINING,
        "checkpoint": CHECKPOINT,
        "limits": LIMITS,
    }.items()
    for name, fault in faults.items()
}
