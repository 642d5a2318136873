"""Small documents that ask for much: from a seed, one of several kinds of attack, in a random size.

As a script, it reads seeds from its arguments, and writes the seconds and the outcome of each, and the memory of all.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from typing import Any

Document = dict[str, Any]
PSI = {"type": "psi"}


def hostile(seed: int) -> tuple[str, Document]:
    """The name of an attack, and a document that carries it out."""
    rng = random.Random(seed)
    attack = ATTACKS[seed % len(ATTACKS)]
    document = {"input": {"shape": [2, 4, 4]}, "layers": [], **attack(rng, 10 ** rng.randint(2, 4), rng.randint(2, 12))}
    return attack.__name__, document


def repeat(times: Any, *layers: Any, **more: Any) -> Document:
    return {"type": "repeat", "times": times, "layers": list(layers), **more}


def nested(depth: int, times: int, innermost: Any) -> Any:
    for _ in range(depth):
        innermost = repeat(times, innermost)
    return innermost


def empty_repeats(rng: random.Random, times: int, depth: int) -> Document:
    return {"layers": [nested(depth, times, {"type": "repeat", "times": times, "layers": []})]}


def repeats_of_faults(rng: random.Random, times: int, depth: int) -> Document:
    fault = {"type": "repeat", "times": {"$var": "no"}, "layers": [PSI]}
    return {"vars": {f"v{i}": i for i in range(50_000)}, "layers": [nested(depth, times, fault)]}


def unknown_keys(rng: random.Random, times: int, depth: int) -> Document:
    keys = {rng.choice("abc") * rng.randint(1, 10_000): i for i in range(times // 10)}
    return {"layers": [repeat(times, {**PSI, **keys}), repeat(times, {"type": "p" * 5_000})]}


def columns_of_constants(rng: random.Random, times: int, depth: int) -> Document:
    """Each iteration of the outer repeat looks at a large constant in the inner one's `with`."""
    large: Any = [[0] * 100 for _ in range(1_000)]
    column = rng.choice([[large], {"$var": "column"}, [{"$var": "large"}], [[{"$var": "large"}, large]]])
    inner = repeat(1, repeat(times, *[]), **{"with": {"a": column}})
    return {"vars": {"large": large, "column": [large]}, "layers": [repeat(10_000, inner)]}


def columns_that_double(rng: random.Random, times: int, depth: int) -> Document:
    layer: Any = {**PSI, "note": {"$item": "a0"}}
    for i in range(depth):
        column = {f"a{i}": [[{"$item": f"a{i + 1}"}] * 10]}
        layer = repeat(1, layer, **{"with": column})
    return {"layers": [repeat(1, layer, **{"with": {f"a{depth}": ["x" * 1000]}})]}


def references(rng: random.Random, times: int, depth: int) -> Document:
    return {"vars": {"v": 1}, "layers": [repeat(times, {"type": "permute", "order": [{"$var": "v"}] * 90})]}


def many_items(rng: random.Random, times: int, depth: int) -> Document:
    column = {f"a{i}": [round(rng.random(), 4) for _ in range(times)] for i in range(10_000 // times + 1)}
    return {"layers": [repeat(times, {"type": "logit", "alpha": {"$item": "a0"}}, **{"with": column})] * 3}


def nested_layers(rng: random.Random, times: int, depth: int) -> Document:
    layer: Any = repeat(times, {"type": "logit"})
    for _ in range(depth):
        layer = rng.choice([{"type": "sequential", "layers": [layer]}, repeat(2, layer)])
        layer = layer if rng.random() < 0.7 else {"type": "inverse", "layer": {"type": "sequential", "layers": [layer]}}
    return {"layers": [layer]}


def deep_nets(rng: random.Random, times: int, depth: int) -> Document:
    net = {"type": rng.choice(["mlp", "lipschitz_mlp"]), "hidden": [1] * 100}
    layer = {"type": "additive_coupling", "net": net} if net["type"] == "mlp" else {"type": "residual", "net": net}
    body = repeat(times, layer)
    body = body if rng.random() < 0.5 else {"type": "sequential", "layers": [body]}
    return {"input": {"shape": [4]}, "layers": [{"type": "split"}, body] if net["type"] == "mlp" else [body]}


def distinct_layers(rng: random.Random, times: int, depth: int) -> Document:
    layer = {"type": "affine_coupling", "clamp": {"$item": "a"}, "net": {"type": "mlp", "hidden": [2]}}
    column = {"a": [1 + i / 7 for i in range(times)]}
    return {"input": {"shape": [4]}, "layers": [{"type": "split"}, repeat(times, layer, **{"with": column})]}


def wide_nets(rng: random.Random, times: int, depth: int) -> Document:
    width = rng.choice([10**5, 2**20, 2**28, 2**40, 2**53])
    net = {"type": rng.choice(["mlp", "lipschitz_mlp", "conv", "lipschitz_conv"]), "hidden": [width, width]}
    return {"layers": [{"type": "residual" if "lip" in net["type"] else "sequential", "net": net}]}


def wide_states(rng: random.Random, times: int, depth: int) -> Document:
    shape = [2 ** rng.randint(12, 28)]
    one = rng.choice([{"type": "linear_1x1"}, {"type": "permute", "seed": 0}, {"type": "residual"}])
    return {"input": {"shape": shape}, "layers": [repeat(times, one)]}


def many_tensors(rng: random.Random, times: int, depth: int) -> Document:
    shape: Any = [8]
    for _ in range(rng.randint(1, 10)):
        shape = [shape, shape]
    each: Any = {"type": "affine"}
    for _ in range(rng.randint(1, 10)):
        each = {"type": "each", "layer": each}
    return {
        "input": {"shape": shape},
        "layers": [repeat(times, each), repeat(times, {"type": "exchange", "order": [1, 0]})],
    }


def long_shapes(rng: random.Random, times: int, depth: int) -> Document:
    return {"input": {"shape": rng.choice([[1] * 200_000, [[1]] * 200_000, [2**53] * 16, [[[1]] * 500] * 500])}}


def large_exact(rng: random.Random, times: int, depth: int) -> Document:
    net: Document = {"type": "mlp", "hidden": [rng.choice([1, 10**5, 10**6])] * 2, "activation": "gelu"}
    net["hidden"] = [1] * depth if rng.random() < 0.5 else net["hidden"][:1]
    numerics = {"mode": "exact", "activation_bits": rng.choice([4, 8, 16])}
    layers = [{"type": "split"}, repeat(times, {"type": "additive_coupling", "net": net})]
    return {"input": {"shape": [4]}, "numerics": numerics, "layers": layers}


def long_texts(rng: random.Random, times: int, depth: int) -> Document:
    return {"name": "x" * 900_000, "vars": {"n": "y" * 100_000}, "layers": [repeat(times, {"note": {"$var": "n"}})]}


ATTACKS = [
    *(
        empty_repeats,
        repeats_of_faults,
        unknown_keys,
        columns_of_constants,
        columns_that_double,
        references,
        many_items,
    ),
    *(nested_layers, deep_nets, distinct_layers, wide_nets, wide_states, many_tensors, long_shapes, large_exact),
    long_texts,
]


def main(seeds: range) -> None:

    import invflow
    from invflow.spec.build import count

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        name, document = hostile(seed)
        start = time.process_time()
        try:
            spec = invflow.load_spec(document)
            parameters = count(spec).parameters
            outcome = "counted"
            if parameters < 10**7:
                invflow.build(spec)
                outcome = "built"
        except invflow.SpecError as error:
            outcome = error.errors[-1]["message"]
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(json.dumps({"seed": seed, "attack": name, "seconds": seconds, "bytes": grown, "outcome": outcome[:200]}))
        sys.stdout.flush()


if __name__ == "__main__":
    main(range(*map(int, sys.argv[1:])))
