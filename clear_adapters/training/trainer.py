"""A thin `transformers.Trainer`: its loop, with our loss, our optimizer groups, and adapters in its checkpoints.

Trainer's checkpoints hold pickles of its own making (optimizer, random states) and stay local; the adapter in them is
an ordinary adapter folder. Nothing is read back from the device but at the steps that are logged.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from clear_adapters import store
from clear_adapters.attached import AttachedModel
from clear_adapters.errors import AdapterError, ClearValueError
from clear_adapters.training.objective import Objective, Order
from clear_adapters.training.shard import ddp_takes_shards, gathered
from clear_adapters.training.watch import is_broken_exchange

_LOG = logging.getLogger(__name__)
ADAPTER = "adapter"
_STATE = "trainer_state.json"
_SECONDS = "seconds.json"


class ClearTrainer(Trainer):
    """Trains an attached model on an objective."""

    def __init__(
        self,
        attached: AttachedModel,
        objective: Objective,
        order: Order,
        args: TrainingArguments,
        *,
        rates: dict[str, float],
        log_file: Path | None = None,
    ) -> None:
        """Gets ready; `train()` runs.

        Args:
            attached: what is trained; its parameters that require gradients are.
            objective: the loss.
            order: the examples in the order of training.
            args: Trainer's own settings.
            rates: learning rate of `lora`, `bridge` and `extra`.
            log_file: JSONL that every log line is added to.

        Raises:
            ClearValueError: nothing requires a gradient.
        """
        if not attached.trainable_parameters():
            raise ClearValueError("nothing of the adapter requires a gradient: there is nothing to train")
        self.attached = attached
        self.objective = objective
        self._rates = rates
        self._log_file = log_file
        # Otherwise a base in shards would be gathered for nothing, and its whole memory taken.
        self._prepares = type(objective).prepare is not Objective.prepare
        self._sums: Tensor | None = None
        self._spent = 0.0
        self._begin = time.perf_counter()
        self._mark = (self._begin, 0)
        super().__init__(
            model=attached.module, args=args, train_dataset=order, data_collator=objective.collate
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_LogAtSave())
        self.loss_is_scaled_for_ga = True
        # A batch may need none of these; the others take part in every forward.
        self._rare = [p for n, p in attached.trainable_parameters().items() if _group(n) != "lora"]

    # -- loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimizer step as the objective prepares them, and what it averages over."""
        batches = list(islice(epoch_iterator, num_batches))
        if self._prepares:
            self.model.eval()
            with torch.no_grad(), gathered(self.attached.module), self.accelerator.autocast():
                batches = self.objective.prepare(batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """(counts,) of everything that the objective averages over, for one optimizer step of all processes."""
        own = torch.stack([batch["counts"] for batch in batch_samples]).sum(0).to(device, non_blocking=True)
        return self.accelerator.reduce(own, "sum") if self.args.world_size > 1 else own

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This batch's share of the step's loss, times the processes, over which gradients are averaged."""
        inputs = {k: v.to(self.args.device) if hasattr(v, "to") else v for k, v in inputs.items()}
        counts = inputs["counts"] if num_items_in_batch is None else num_items_in_batch
        out = self.objective.loss(model, inputs, counts)
        shares = torch.stack([out[name].detach().float() for name in self.objective.parts])
        self._sums = shares if self._sums is None else self._sums + shares
        loss = out["loss"]
        for parameter in self._rare:
            loss = loss + 0 * parameter.sum()
        loss = loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    # -- optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for LoRA, for the bridge and for modules trained whole."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            a = self.args
            groups: dict[str, list[nn.Parameter]] = {}
            for name, parameter in self.attached.trainable_parameters().items():
                groups.setdefault(_group(name), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [{"params": held, "lr": self._rates[name]} for name, held in groups.items()],
                betas=(a.adam_beta1, a.adam_beta2),
                eps=a.adam_epsilon,
                weight_decay=a.weight_decay,
                fused=a.device.type == "cuda",
            )
        return self.optimizer

    # -- files

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter as it is held, so that a resumed run goes on with the same numbers."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self.attached.save_pretrained(folder / ADAPTER, overwrite=True)
            (folder / _SECONDS).write_text(json.dumps(self.seconds), encoding="utf-8")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's; what a full disk leaves half-written is taken away.

        Raises:
            ClearValueError: it cannot be written; the checkpoint before is whole.
        """
        folder = Path(str(self.args.output_dir))
        try:
            super()._save_checkpoint(model, trial)
        # torch's writer and safetensors tell of a full disk in errors of their own.
        except (OSError, RuntimeError, SafetensorError, AdapterError) as error:
            if is_broken_exchange(error):
                raise
            if self.args.should_save:
                step = self.state.global_step
                shutil.rmtree(folder / f"{PREFIX_CHECKPOINT_DIR}-{step}", ignore_errors=True)
            if not self._is_finite():
                raise self._diverged("weights that are not finite") from error
            raise self._unwritable("no checkpoint", error) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state file, which makes a checkpoint whole, comes behind all processes' files.
        self.accelerator.wait_for_everyone()

    def _unwritable(self, what: str, error: Exception) -> ClearValueError:
        folder = Path(str(self.args.output_dir))
        last = newest_checkpoint(folder)
        return ClearValueError(
            f"step {self.state.global_step}: {what} can be written to {folder}: {error}. Make room, or make it writable, and "
            f"give the same command again: it goes on from {'the beginning' if last is None else last.name}"
        )

    def _diverged(self, found: str) -> ClearValueError:
        return ClearValueError(
            f"step {self.state.global_step}: {found}: training diverged, and its adapter would be noise. Lower optim.lr (now "
            f"lr={self._get_learning_rate():g}), or go back to an earlier checkpoint in {self.args.output_dir}"
        )

    def _is_finite(self) -> bool:
        return all(bool(p.isfinite().all()) for _, p in self.attached.named_parameters())

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self._spent + time.perf_counter() - self._begin

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = store.read_adapter(Path(resume_from_checkpoint) / ADAPTER)
        stored.check(self.attached.backbone)
        tensors = {
            **stored.lora,
            **stored.extra,
            **{f"bridge.{n}": t for n, t in stored.bridge.items()},
        }
        with torch.no_grad():
            # In place: the optimizer holds these very parameters.
            for name, parameter in self.attached.named_parameters():
                parameter.copy_(tensors[name])
        self._spent = json.loads((Path(resume_from_checkpoint) / _SECONDS).read_text(encoding="utf-8"))
        self._trim_log(_step_of(Path(resume_from_checkpoint)))

    def _trim_log(self, step: int) -> None:
        """Takes away log lines of steps that will be taken again."""
        if self._log_file is None or not self._log_file.is_file() or not self.is_world_process_zero():
            return
        lines = self._log_file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        self._log_file.write_text("".join(kept), encoding="utf-8")

    # -- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss and the seconds a step, and a line to the log file."""
        now, step = time.perf_counter(), self.state.global_step
        if self._sums is not None and "loss" in logs:
            sums = self._sums
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums, "sum")
            if not math.isfinite(float(logs["loss"])):
                raise self._diverged(f"loss={logs['loss']}")
            steps = max(1, step - self._mark[1])
            for name, value in zip(self.objective.parts, sums.tolist(), strict=True):
                logs[name] = value / steps
            logs |= self._facts()
            logs["seconds_per_step"] = (now - self._mark[0]) / steps
            self._sums = None
        self._mark = (now, step)
        if self._log_file is not None and self.is_world_process_zero():
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in logs.items()}
            try:
                with self._log_file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"step": step, **rounded}) + "\n")
            except OSError as error:
                raise self._unwritable("no line of the log", error) from error
        super().log(logs, start_time)

    def _facts(self) -> dict[str, float]:
        """The objective's means over all processes; those of nothing are left out."""
        found = self.objective.facts()
        if not found:
            return {}
        sums = torch.tensor(list(found.values()), dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, "sum")
        return {n: total / count for n, (total, count) in zip(found, sums.tolist(), strict=True) if count}

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            # accelerate puts autocast around forward, and Trainer sets the training mode: both are undone.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.eval()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        with ddp_takes_shards():
            made = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._begin = time.perf_counter()
        self._mark = (self._begin, self.state.global_step)
        return made


class _LogAtSave(TrainerCallback):
    """A checkpoint ends a line of the log, so that a run that goes on from it logs what an unbroken one does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save


def _group(name: str) -> str:
    """The optimizer group of a parameter by its name in the adapter's files."""
    if name.startswith("bridge."):
        return "bridge"
    return "lora" if ".lora_" in name else "extra"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; half-written ones, which a killed run leaves, are deleted."""
    for path in _checkpoints(folder):
        if not _is_whole(path / _STATE):
            shutil.rmtree(path)
    return newest_checkpoint(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, also while one is written."""
    whole = [path for path in _checkpoints(folder) if _is_whole(path / _STATE)]
    return max(whole, key=_step_of, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    """The run's own; folders that someone has named alike are not."""
    return [
        path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()
    ]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(state: Path) -> bool:
    """Whether a checkpoint's last file is there to its end."""
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles decoder layers in place, for any length of row."""
    for layer in layers:
        layer.compile(dynamic=True)


def training_arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Trainer's settings as this library needs them.

    Args:
        folder: of checkpoints.
        settings: further or other values.
    """
    workers = settings.get("dataloader_num_workers", 0)
    chosen = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if chosen not in ("no", "bf16" if settings.get("bf16") else "no"):
        # Trainer would take it where the recipe says float32, or has another type.
        _LOG.warning(
            "accelerate's mixed precision (%s) is left out: the recipe has its own, loop.bf16", chosen
        )
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    # Read by the tokenizer after a fork; without it every worker prints a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "remove_unused_columns": False,
        "report_to": "none",
        "logging_nan_inf_filter": False,  # it would read the loss back at every step
        "dataloader_persistent_workers": workers > 0,
        "dataloader_prefetch_factor": 4 if workers else None,
        "accelerator_config": {"non_blocking": not settings.get("use_cpu", False), "even_batches": False},
        "ddp_find_unused_parameters": False,
        "logging_first_step": True,
        **settings,
    }
    args = TrainingArguments(**values)
    # One process drives one device; several devices are several processes.
    args._n_gpu = min(1, args.n_gpu)
    return args
