"""Writing the settings of a conversion to a file."""

from __future__ import annotations

from pathlib import Path

from lightning_mics.deepspeed.conversion import Conversion
from lightning_mics.errors import MiCSConfigError
from lightning_mics.topology import ClusterTopology, check_positive_int

# What Accelerate's launch file has no place for travels in variables.
_BESIDE_THE_LAUNCH_FILE = ("hierarchical", "reduce_dtype")


def node_size_of(world_size: int | None, num_machines: int | None) -> int | None:
    """Returns the number of ranks on a machine, as far as it is known.

    Raises:
        MiCSConfigError: If the ranks cannot be spread evenly over the machines.
    """
    if num_machines is None:
        return None
    check_positive_int("num_machines", num_machines, 2)
    if world_size is None:
        raise MiCSConfigError(f"--num-machines {num_machines} needs the number of ranks, too. Add --world-size 16.")
    check_positive_int("world_size", world_size, 8)
    if world_size % num_machines:
        below = max(1, world_size // num_machines) * num_machines
        raise MiCSConfigError(
            f"--world-size {world_size} cannot be spread evenly over --num-machines {num_machines}. Try --world-size "
            f"{below}."
        )
    return world_size // num_machines


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """Writes a file that must not exist yet, unless told otherwise.

    Raises:
        MiCSConfigError: If it exists, or cannot be written.
    """
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise MiCSConfigError(f"{path} exists. Choose another --output, or replace it with --force.") from error
    except OSError as error:
        raise MiCSConfigError(f"{path} cannot be written ({error.strerror}). Choose another --output.") from error


def write_for_accelerate(
    conversion: Conversion,
    path: Path,
    *,
    world_size: int | None,
    num_machines: int = 1,
    main_process_ip: str | None = None,
    force: bool = False,
) -> str:
    """Writes a file for ``accelerate launch --config_file``.

    Returns:
        The command that starts a script with it.

    Raises:
        MiCSConfigError: If the number of ranks is not given, the sizes do not fit, or the file exists.
    """
    from lightning_mics.accelerate.launch_file import LaunchSettings, launch_commands, write_launch_file

    if world_size is None:
        example = conversion.world_size or 8
        why = ", which is what the batch sizes imply" if conversion.world_size else ""
        raise MiCSConfigError(
            f"A launch file for Accelerate names the number of ranks. Add --world-size {example}{why}."
        )
    node_size = world_size // num_machines
    topology = ClusterTopology(world_size=world_size, node_size=node_size)
    settings = LaunchSettings(
        shard_size=topology.resolve_shard_size(conversion.config.shard_size),
        num_processes=world_size,
        num_machines=num_machines,
        main_process_ip=main_process_ip,
        mixed_precision=conversion.mixed_precision or "no",  # type: ignore[arg-type]
        activation_checkpointing=conversion.config.activation_checkpointing,
        cpu_offload=conversion.config.cpu_offload,
    )
    variables = {
        f"MICS_{name.upper()}": str(value).lower()
        for name, value in conversion.settings().items()
        if name in _BESIDE_THE_LAUNCH_FILE
    }
    write_launch_file(path, settings, environment=variables, force=force)
    return launch_commands(path, variables)[0]
