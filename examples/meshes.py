"""Many devices: a mesh with axes for data, FSDP and experts, and what lies where on it.

Rows of a batch are split over data and fsdp together. Experts are split over expert, and every
large parameter over fsdp; routers, norms and decisions are whole on every device.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from command_line import UserError
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import PyTree

import meta_optax as mo

DATA, FSDP, EXPERT = AXES = ("data", "fsdp", "expert")
ROWS = (DATA, FSDP)
# Splitting what is smaller costs more messages than it saves bytes.
SMALLEST_SPLIT = 4096


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """Makes a mesh of the first devices; of the CPU, as many devices as it takes.

    Args:
        sizes: how many devices there are along each of `AXES`; 1 along those left out.

    Returns:
        The mesh, with automatic axes.

    Raises:
        UserError: if there are too few devices.
    """
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    count = int(np.prod(shape))
    _make_cpu_devices(count)
    devices = jax.devices()
    if len(devices) < count:
        wanted = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"--mesh {wanted} needs {count} devices, but there are {len(devices)} "
            f"({devices[0].platform})"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


def _make_cpu_devices(count: int) -> None:
    """Lets the CPU count as so many devices, if JAX has not started; accelerators stay as they are.

    A count that somebody chose in the environment is left alone, and so are several processes.
    """
    if jax.distributed.is_initialized() or "xla_force_host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    ):
        return
    # There is nothing to be done once the backend has started: `make_mesh` says what is missing.
    with contextlib.suppress(RuntimeError):
        configured = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", max(count, configured))


def use_mesh(sizes: Mapping[str, int] | None) -> contextlib.AbstractContextManager[Any]:
    """Makes a mesh and puts it into force; without sizes, everything stays on one device."""
    return contextlib.nullcontext() if sizes is None else jax.set_mesh(make_mesh(sizes))


def current_mesh() -> Mesh | None:
    """Returns the mesh in force, if there is one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def state_shardings(
    mesh: Mesh, tx: optax.GradientTransformationExtraArgs, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Says where params and the optimizer's state belong: moments lie as their params do.

    Args:
        mesh: the mesh.
        tx: the optimizer.
        params: the params, or their shapes.

    Returns:
        The shardings of the params, and those of the optimizer's state.

    Raises:
        UserError: if the experts cannot be split evenly.
    """
    own = param_shardings(mesh, params)
    moments = optax.tree.map_params(
        tx,
        lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,
        jax.eval_shape(tx.init, params),
        own,
        transform_non_params=lambda _: NamedSharding(mesh, jax.P()),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return own, moments


def param_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """Says where params belong: experts over expert, large ones over fsdp, routers everywhere.

    Args:
        mesh: the mesh.
        params: the params, or their shapes.

    Returns:
        A sharding for each.

    Raises:
        UserError: if the experts cannot be split evenly.
    """

    def place(label: str, leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * leaf.ndim
        if label == "expert":
            if leaf.shape[0] % mesh.shape[EXPERT]:
                raise UserError(
                    f"--mesh expert={mesh.shape[EXPERT]} cannot split {leaf.shape[0]} experts"
                )
            spec[0] = EXPERT
        free = [i for i in range(leaf.ndim) if not spec[i] and not leaf.shape[i] % mesh.shape[FSDP]]
        if label != "gate" and free and leaf.size >= SMALLEST_SPLIT and mesh.shape[FSDP] > 1:
            spec[max(free, key=lambda i: leaf.shape[i])] = FSDP
        return NamedSharding(mesh, jax.P(*spec))

    return jax.tree.map(place, mo.label_moe_params(params), params)


def check_rows(mesh: Mesh, rows: int) -> None:
    """Raises unless so many rows can be split over data and fsdp.

    Raises:
        UserError: naming the sizes.
    """
    parts = mesh.shape[DATA] * mesh.shape[FSDP]
    if rows % parts:
        raise UserError(
            f"--mesh data={mesh.shape[DATA]},fsdp={mesh.shape[FSDP]} splits a batch into {parts} "
            f"equal parts, which {rows} rows cannot be"
        )


def place_rows(batch: PyTree) -> PyTree:
    """Splits the rows of a batch over the mesh in force; without one, returns it as it is.

    Of several processes, each passes its own share of the rows.
    """
    mesh = current_mesh()
    if mesh is None:
        return batch
    rows = NamedSharding(mesh, jax.P(ROWS))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), batch
    )
