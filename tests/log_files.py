"""Reads back what a `MetricsWriter` wrote."""

import json
import pathlib
import struct

import numpy as np

import meta_optax as mo
from meta_optax import analysis


def lines_of(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (pathlib.Path(folder) / "metrics.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events_of(folder):
    """The events of all files, each record checked against its sums."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    events = []
    for path in sorted(pathlib.Path(folder).glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,), (crc,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
            body, (body_crc,) = data[12 : 12 + size], struct.unpack("<I", data[12 + size :][:4])
            assert (crc, body_crc) == (masked_crc32c(data[:8]), masked_crc32c(body))
            events.append(event_pb2.Event.FromString(body))
            data = data[16 + size :]
    return events


def scalars_of(folder):
    return {
        (event.step, value.tag): value.simple_value
        for event in events_of(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    }


def texts_of(folder):
    return [
        (event.step, value.tensor.string_val[0].decode())
        for event in events_of(folder)
        for value in event.summary.value
        if value.tag == "decisions/text_summary"
    ]


def make_writer(folder, **kwargs):
    return mo.MetricsWriter(folder, **{"tensorboard": False, **kwargs})


def make_log(path="run/log.jsonl", steps=None, decisions=(), absent=(), **values):
    """A log of what is given by key; a slash in a key is a double underscore."""
    arrays = {key.replace("__", "/"): np.asarray(one, float) for key, one in values.items()}
    rows = len(next(iter(arrays.values())))
    steps = np.arange(rows) if steps is None else np.asarray(steps)
    return analysis.Log(pathlib.Path(path), steps, arrays, list(decisions), dict(absent))
