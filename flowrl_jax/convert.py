"""Policies in and out: `python -m flowrl_jax.convert export` and `... import`.

    export --run=DIR --out=FOLDER [--config=FILE] [--step=N] [--dtype=bfloat16] [--adapter]

writes the policy of a run as a Hugging Face folder: config.json, safetensors, the tokenizer's files
and generation_config.json. What the run learned of log Z goes to FOLDER/log_z, which programs that
serve the policy do not look into. Without --config the settings are those that the run kept.
Adapters that the run trained are added to the weights; with --adapter they alone are written, as
the PEFT library reads them.

    import --config=FILE --out=DIR

makes the Hugging Face checkpoint that `model.path` names the first checkpoint of a run folder,
which `model.start_from`, `sample` and `evaluate` accept.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import traverse_util

from flowrl_jax import cli
from flowrl_jax.assembly import (
    CHECKPOINTS,
    TOKENIZER_FILE,
    Parts,
    assemble,
    configure_jax,
    load_pretrained,
    load_run_policy,
)
from flowrl_jax.checkpoint import CheckpointConfig, Checkpointer, restore_host, restore_log_z
from flowrl_jax.config import Config
from flowrl_jax.distributed import define_flags, join
from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import LoraConfig
from flowrl_jax.models.hf_fields import read_json
from flowrl_jax.models.hf_save import (
    DTYPES,
    GENERATION_FILE,
    carried_fields,
    count_tensors,
    write_json,
    write_policy,
    write_tensors_file,
)
from flowrl_jax.models.log_z import init_log_z
from flowrl_jax.models.lora import merged
from flowrl_jax.models.peft import write_adapter
from flowrl_jax.new_folder import check_new, in_first_process, new_folder
from flowrl_jax.objectives.log_z import LogZConfig
from flowrl_jax.progress import Progress
from flowrl_jax.settings import load_settings, save_settings
from flowrl_jax.types import TrainState

LOG_Z_FOLDER = "log_z"


def export_run(
    config: Config,
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
) -> int:
    """Writes a policy of a run as a Hugging Face folder that gives the same logits.

    Args:
        config: the run's settings.
        run: the run's folder.
        out: folder to make; it appears whole or not at all.
        step: which checkpoint; the latest if None.
        dtype: of the tensors, one of `DTYPES`; float32, as trained, if None.
        adapter: write the run's adapters alone, for the base model that `model.path` names.

    Returns:
        The step.

    Raises:
        InputError: the run, the checkpoint or the settings are wrong, numbers are too large for the
            dtype, or `out` holds something or cannot be written.
    """
    check_new(out)
    _, step = restore_host(Path(run) / CHECKPOINTS, step)
    parts = assemble(config, run)
    lora = config.model.lora
    if adapter and not lora.rank:
        raise InputError("--adapter: model.lora.rank=0, the run trained no adapters; leave it out")
    policy = load_run_policy(parts, run, step)
    if adapter:
        base = config.model.path or config.model.start_from
        with new_folder(out) as folder:
            write_adapter(folder, parts.model.config, policy, base)
        return step
    if lora.rank:
        # The frozen weights are held in the compute dtype, the adapters in float32.
        policy, dtype = merged(policy, lora), dtype or DTYPES[0]
    log_z, _ = restore_log_z(Path(run) / CHECKPOINTS, step)
    log_z_config = getattr(config.loss, "log_z", None)
    _check_log_z(log_z_config, log_z, parts.model.config.embed_dim)
    fields, generation = _fields(parts)
    total = count_tensors(parts.model.config)
    with new_folder(out) as folder, Progress(total, "export", unit="tensor") as progress:
        write_policy(
            folder,
            parts.model.config,
            policy,
            tokenizer_path=_tokenizer_place(config, run),
            fields=fields,
            generation=generation,
            dtype=dtype,
            on_tensor=progress.update,
        )
        if parts.chat is not None and config.tokenizer.chat_template:
            # Goes before the one of the tokenizer, which the policy was not trained with.
            in_first_process(functools.partial(_write_template, folder, parts.chat.source))
        if log_z and log_z_config is not None:
            write = functools.partial(
                _write_log_z, folder / LOG_Z_FOLDER, log_z, log_z_config, step
            )
            in_first_process(write)
    return step


def import_checkpoint(config: Config, out: str | Path) -> None:
    """Makes the checkpoint that `model.path` names the first one of a run folder.

    Args:
        config: the settings, which the folder keeps.
        out: folder to make; it appears whole or not at all.

    Raises:
        InputError: `model.path` is empty or what lies there is wrong, or `out` holds something or
            cannot be written.
    """
    if not config.model.path:
        raise InputError(
            "config.model.path is empty: name the Hugging Face folder, --config.model.path=FOLDER"
        )
    # The checkpoint has all weights, whatever a run that starts from it will train.
    whole = dataclasses.replace(config.model, start_from="", lora=LoraConfig())
    config = dataclasses.replace(config, model=whole)
    check_new(out)
    parts = assemble(config, out)
    total = count_tensors(parts.model.config)
    with Progress(total, "import", unit="tensor") as progress:
        policy = load_pretrained(parts, progress.update)
    zero = jax.device_put(jnp.zeros((), jnp.int32), parts.layout.replicated)
    # Nothing has been learned: there is no log Z yet, and no moment.
    state = TrainState(zero, {"policy": policy, "log_z": {}}, {}, zero)
    with new_folder(out) as folder:
        settings = CheckpointConfig(every=0, keep=1, asynchronous=False)
        with Checkpointer(folder / CHECKPOINTS, settings) as checkpointer:
            checkpointer.save_final(0, state, {"position": 0})
        in_first_process(lambda: save_settings(folder, config))


def _fields(parts: Parts) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json says besides the decoder, and generation_config.json."""
    config, tokenizer = parts.config, parts.tokenizer
    generation: dict[str, Any] = {}
    if config.model.path:
        source = Path(config.model.path)
        fields = carried_fields(source, parts.model.config)
        if (source / GENERATION_FILE).is_file():
            generation = read_json(source / GENERATION_FILE)
    else:
        rollout = config.rollout
        fields = {
            "max_position_embeddings": rollout.max_prompt_length + rollout.max_response_length,
            "bos_token_id": tokenizer.bos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    ends = parts.eos_ids[0] if len(parts.eos_ids) == 1 else list(parts.eos_ids)
    known = fields.get("eos_token_id")
    if not all(i in parts.eos_ids for i in (known if isinstance(known, list) else [known])):
        fields["eos_token_id"] = ends
    for name in ("bos_token_id", "pad_token_id"):
        if fields.get(name) is not None:
            generation.setdefault(name, fields[name])
    return fields, generation | {"eos_token_id": ends}


def _tokenizer_place(config: Config, run: str | Path) -> Path:
    """File or folder of a run's tokenizer; a vocabulary made for the run lies in its folder."""
    return Path(config.tokenizer.path or config.model.path or Path(run, TOKENIZER_FILE))


def _check_log_z(config: LogZConfig | None, params: Any, embed_dim: int) -> None:
    """Checks that what a checkpoint holds of log Z is what the settings describe."""
    if not params:
        return
    rows = params["value"].shape[0] if params.keys() == {"value", "visits"} else 1
    init = functools.partial(init_log_z, config, embed_dim, rows)
    found = {path: x.shape for path, x in _by_path(params).items()}
    asked = {path: x.shape for path, x in _by_path(jax.eval_shape(init, jax.random.key(0))).items()}
    if found != asked:
        raise InputError(
            f"the checkpoint's log Z has {', '.join(sorted(found))}, which is not what loss.log_z"
            " describes: give the settings of the run that wrote it"
        )


def _write_template(folder: Path, source: str) -> None:
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")


def _write_log_z(folder: Path, params: Any, config: LogZConfig, step: int) -> None:
    """Writes log_z.safetensors, tensors by path, and log_z.json, the settings it was learned by."""
    folder.mkdir()
    tensors = {name: np.asarray(x) for name, x in _by_path(params).items()}
    write_tensors_file(folder / "log_z.safetensors", tensors)
    write_json(folder / "log_z.json", {"step": step, "log_z": dataclasses.asdict(config)})


def _by_path(params: Any) -> dict[str, Any]:
    """Leaves by the names of their tensors, such as "output.kernel"."""
    leaves: Any = traverse_util.flatten_dict(params, sep=".")
    return leaves


def _export_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", "", "folder of the run", flag_values=values)
    flags.DEFINE_string("out", "", "folder to make", flag_values=values)
    flags.DEFINE_integer("step", None, "of the checkpoint; default: the latest", flag_values=values)
    flags.DEFINE_string(
        "dtype",
        None,
        f"of the tensors: {', '.join(DTYPES)}; default: as trained",
        flag_values=values,
    )
    flags.DEFINE_bool("adapter", False, "write the run's adapters alone", flag_values=values)
    define_flags(values)


def _import_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "", "folder of the run to make", flag_values=values)
    define_flags(values)


def _required(values: flags.FlagValues, name: str, what: str) -> str:
    if not values[name].value:
        raise InputError(f"--{name} is missing: name {what}")
    return str(values[name].value)


def _run_of(values: flags.FlagValues) -> str:
    run = _required(values, "run", "the folder of a run")
    if not Path(run).is_dir():
        raise InputError(f"--run={run}: no such folder; name the folder of a run")
    return run


def _own_settings(values: flags.FlagValues) -> Mapping[str, Any]:
    return load_settings(_run_of(values))


def _export(config: Config, values: flags.FlagValues) -> None:
    run, out = _run_of(values), _required(values, "out", "the folder to make")
    dtype = values["dtype"].value
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype={dtype}: not known; give one of {', '.join(DTYPES)}")
    join(values)
    configure_jax()
    adapter = bool(values["adapter"].value)
    if adapter and dtype is not None:
        raise InputError("--adapter: adapters are float32, as trained; leave --dtype out")
    step = export_run(config, run, out, step=values["step"].value, dtype=dtype, adapter=adapter)
    if jax.process_index() == 0:
        print(f"{out}: the policy of step {step}")


def _import(config: Config, values: flags.FlagValues) -> None:
    out = _required(values, "out", "the folder of the run to make")
    join(values)
    configure_jax()
    import_checkpoint(config, out)
    if jax.process_index() == 0:
        print(f"{out}: {config.model.path} as the checkpoint of step 0")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words and not words[0].startswith("-") else ""
    if command == "import":
        values = cli.config_flag_values("Makes a Hugging Face checkpoint a run's first checkpoint.")
        _import_flags(values)
        return cli.run(_import, values, words)
    values = cli.config_flag_values(
        "export: writes a run's policy as a Hugging Face folder (without --config the settings are"
        " the run's). For the other way see `import --help`."
    )
    _export_flags(values)
    if command == "export" or {"--help", "-h"} & set(words):
        return cli.run(_export, values, words, own_settings=_own_settings)
    print(f"error: {command or 'no command'}: write `export` or `import` first", file=sys.stderr)
    return cli.WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
