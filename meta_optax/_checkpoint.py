"""Where an optimizer's state lives: templates to restore a checkpoint into."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

_REMEDY = "Give ShapeDtypeStructs with the shardings to restore onto."


class _Place(NamedTuple):
    """A param's shape and where it lives."""

    shape: tuple[int, ...]
    sharding: Any


def checkpoint_template(tx: Any, params: Any, mesh: Mesh | None = None) -> Any:
    r"""The tree of shapes, dtypes and shardings to restore an optimizer's state into.

    With :math:`p(x)` the param that the leaf :math:`x` of ``tx.init(params)`` mirrors, as Adam's
    moments do, where it has that param's shape,

    .. math::
      \text{sharding}(x) = \begin{cases}
        \text{sharding}(p(x)) & \text{if there is such a param} \\
        \text{every device of the mesh} & \text{else}
      \end{cases}

    So decisions, counts and logs are on every device. A template of `jax.eval_shape` alone leaves
    them on one, and the next jitted step fails on incompatible devices. Nothing is allocated.

    Args:
      tx: the transformation, of this library or not.
      params: the params, or their shapes as `jax.ShapeDtypeStruct`, as they will be after the
        restore: to restore on other devices, give shapes with those shardings.
      mesh: the mesh to restore onto. By default that of the params' named shardings or, where they
        have none, the one device that they are on (the default device for shapes alone).

    Returns:
      The state's tree with a `jax.ShapeDtypeStruct` with a sharding for each leaf, for Orbax. The
      shardings alone let the state be made where it belongs:
      ``jax.jit(tx.init, out_shardings=jax.tree.map(lambda s: s.sharding, template))(params)``.

    Raises:
      ValueError: if the params are on two meshes or sets of devices, or on another mesh than the
        one given, or if a sharding of theirs belongs to no concrete mesh.

    Example:
      >>> import jax, jax.numpy as jnp, meta_optax as mo, optax
      >>> tx = mo.inject_meta_hyperparams(optax.adamw, mo.plateau())(learning_rate=1e-3)
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> split = jax.NamedSharding(mesh, jax.P("data"))
      >>> params = {"w": jax.ShapeDtypeStruct([8], jnp.float32, sharding=split)}
      >>> template = mo.checkpoint_template(tx, params)
      >>> template.inner_state[0].mu["w"].sharding.spec, template.count.sharding.spec
      (P('data',), P())
    """
    whole, places = _places(params, mesh)
    shapes = jax.eval_shape(tx.init, params)

    def abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def mirror(subtree: Any) -> Any:
        # By paths, not side by side: a group's moments are placeholders elsewhere, and some
        # optimizers keep a list or a tuple where the params have a leaf.
        def put(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            ends = (path[:end] for end in range(len(path), -1, -1))
            near = next((places[end] for end in ends if end in places), _Place((), whole))
            return abstract(leaf, near.sharding if near.shape == leaf.shape else whole)

        return jax.tree_util.tree_map_with_path(put, subtree)

    return optax.tree.map_params(
        # Optax asks for the state of a placeholder, which has no leaves: also by shapes alone.
        lambda placeholder: jax.eval_shape(lambda: tx.init(placeholder)),
        mirror,
        shapes,
        transform_non_params=lambda leaf: abstract(leaf, whole),
        is_leaf=lambda _: True,
    )


def fresh_leaves(tx: Any, params: Any, template: Any, wanted: list[int]) -> dict[int, Any]:
    """Some leaves of ``tx.init(params)`` by their number, each where the template says.

    Only those leave the computation, so XLA makes no second set of moments. Params that are shapes
    alone count as zeros.
    """
    if not wanted:
        return {}
    leaves, treedef = jax.tree.flatten(params)
    known = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, jax.ShapeDtypeStruct)]
    places = [leaf.sharding for leaf in jax.tree.leaves(template)]
    shardings = None if _is_loose(params) else [places[i] for i in wanted]

    @functools.partial(jax.jit, out_shardings=shardings)
    def start(arrays: list[Any]) -> list[Any]:
        given = dict(zip(known, arrays, strict=True))
        filled = [
            given[i] if i in given else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        state = jax.tree.leaves(tx.init(treedef.unflatten(filled)))
        return [state[i] for i in wanted]

    return dict(zip(wanted, start([leaves[i] for i in known]), strict=True))


def place(leaf: Any, like: jax.ShapeDtypeStruct, params: Any) -> Any:
    """A leaf where the template says; bound to no device where the params are not.

    A bound state beside free params would bind these at the first step: a second compile.
    """
    if _is_loose(params) and not getattr(leaf, "committed", False):
        return jax.numpy.asarray(leaf)
    return jax.device_put(leaf, like.sharding)


def _is_loose(params: Any) -> bool:
    """Whether all params are arrays that JAX may still move, as those made outside of any mesh."""
    leaves = jax.tree.leaves(params)
    return bool(leaves) and all(
        isinstance(leaf, jax.Array) and not leaf.committed for leaf in leaves
    )


def _places(params: Any, mesh: Mesh | None) -> tuple[Any, dict[Any, _Place]]:
    """The sharding of what mirrors no param, and the place of each param by its path."""
    named, single, loose = [], [], []
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            named.append((path, _concrete(path, sharding, mesh)))
        elif isinstance(sharding, SingleDeviceSharding):
            (single if getattr(leaf, "committed", True) else loose).append((path, sharding))
        elif sharding is not None:
            raise ValueError(
                f"The param {_name(path)} has the sharding {sharding}, whose mesh is not known. "
                + _REMEDY
            )
    if mesh is None and named:
        mesh = named[0][1].mesh
    _check_one_mesh(mesh, named, single)
    whole = NamedSharding(mesh, PartitionSpec()) if mesh is not None else _device(single or loose)
    own = dict(named)
    return whole, {p: _Place(jnp.shape(leaf), own.get(p, whole)) for p, leaf in leaves}


def _concrete(path: Any, sharding: NamedSharding, mesh: Mesh | None) -> NamedSharding:
    """A named sharding on devices; shapes made under an abstract mesh take the one given."""
    if not isinstance(sharding.mesh, AbstractMesh):
        return sharding
    if mesh is None or mesh.abstract_mesh.shape_tuple != sharding.mesh.shape_tuple:
        raise ValueError(
            f"The param {_name(path)} is on the abstract mesh {sharding.mesh}, got mesh={mesh}: "
            "pass the mesh of devices that it stands for."
        )
    return NamedSharding(mesh, sharding.spec)


def _check_one_mesh(mesh: Mesh | None, named: list[Any], single: list[Any]) -> None:
    """Raises if the params are on different meshes or devices, as the next jit would."""
    for path, sharding in named:
        if sharding.mesh != mesh:
            raise ValueError(
                f"The param {_name(path)} is on {sharding.mesh}, and the state is to be on {mesh}. "
                + _REMEDY
            )
    for path, sharding in single:
        target = set(single[0][1].device_set if mesh is None else mesh.devices.flat)
        if sharding.device_set != target:
            raise ValueError(
                f"The param {_name(path)} is on {sharding.device_set} alone, and the state is to "
                f"be on {target}. " + _REMEDY
            )


def _device(found: list[tuple[Any, SingleDeviceSharding]]) -> SingleDeviceSharding:
    """The one device that params are on, or that JAX would put them on."""
    if found:
        return SingleDeviceSharding(next(iter(found[0][1].device_set)))
    # JAX makes the attributes of its configuration while it is imported.
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return SingleDeviceSharding(device)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "(the only one)"
