"""Every hardware configuration of a network, one after the other: what the claim of HAO is compared with."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from netwright.search._hao_model import cycles, subgraphs, weight_traffic
from netwright.search.hao import Convolution, HAOMapper

__all__ = ["latencies"]

Array: TypeAlias = NDArray[np.float64]


def latencies(layers: list[Convolution], mapper: HAOMapper) -> Array:
    """Latency in ms of every configuration that fits the device, one after the other."""
    options, device = mapper.options(layers), mapper.device
    places = dict(zip(options, np.indices([*map(len, options.values())]).reshape(len(options), -1), strict=True))

    def total(terms: list[tuple[str, list[float]]]) -> Array:
        found: Array = np.sum([np.array(values, dtype=float)[places[kind]] for kind, values in terms], axis=0)
        return found

    cycles_taken = np.zeros(mapper.configurations(layers))
    for group in subgraphs(layers):
        busy = [total([(layer.kind, [cycles(layer, e) for e in options[layer.kind]])]) for layer in group]
        weights = total([(layer.kind, [weight_traffic(layer, e.rows) for e in options[layer.kind]]) for layer in group])
        traffic = weights + group[0].input_bytes + group[-1].output_bytes
        cycles_taken += np.maximum(np.max(busy, axis=0), traffic / device.bytes_per_cycle)
    fits = total([(kind, [e.dsps for e in engines]) for kind, engines in options.items()]) <= device.dsps
    fits &= total([(kind, [e.buffer_kb for e in engines]) for kind, engines in options.items()]) <= device.buffer_kb
    latency_ms: Array = cycles_taken[fits] / (1000 * device.clock_mhz)
    return latency_ms
