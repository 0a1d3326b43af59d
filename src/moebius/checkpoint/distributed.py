"""Saving by many ranks at once, through PyTorch's distributed checkpoints: nobody holds the whole.

DCP copies what each rank has, in a thread brings the ranks together, and says every rank what went
wrong on any. What it plans and writes is ours: each rank writes its fragments into safetensors
files of its own and reads them again, and the first commits the checkpoint as `save` does.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from moebius.checkpoint.background import Background
from moebius.checkpoint.manifest import CheckpointError
from moebius.checkpoint.save import JSON, Whole
from moebius.checkpoint.tensors import entry_name, plan_files
from moebius.ops.shard import Fragment


def save_fragments(
    folder: Path,
    step: int,
    fragments: Mapping[str, list[Fragment]],
    state: Mapping[str, JSON],
    keep: int,
    ranks: dist.ProcessGroup,
    background: Background | None = None,
) -> None:
    """`checkpoint.save` of what all ranks of a group together have, by tensor; collective.

    Each element must be given by one rank alone. `ranks` must be a group of its own that speaks
    through the host: with a `background`, a thread uses it while the run goes on. Errors are raised
    on every rank, there by `background.wait`.
    """
    if background is not None:
        background.wait()
    found = [(_item(name, each), each.tensor) for name, some in fragments.items() for each in some]
    parts: dict[str, Any] = {_entry(item): tensor.detach() for item, tensor in found}
    whole = Whole(folder, step, state, keep)
    planner, writer = _Planner([item for item, _ in found]), _Writer(whole, dist.get_rank(ranks))
    if background is None:
        try:
            save(parts, storage_writer=writer, planner=planner, process_group=ranks)
        except CheckpointException as error:
            raise writer.failed(error) from error
        return
    writing = async_save(parts, storage_writer=writer, planner=planner, process_group=ranks)
    assert isinstance(writing, Future)
    told: Future[Any] = Future()

    def tell(done: Future[Any]) -> None:
        error = done.exception()
        if isinstance(error, CheckpointException):
            error = writer.failed(error)
        if error is None:
            told.set_result(None)
        else:
            told.set_exception(error)

    writing.add_done_callback(tell)
    background.follow(told)


def _item(name: str, fragment: Fragment) -> WriteItem:
    """What DCP knows of a fragment."""
    first = (fragment.row, fragment.column, *(0 for _ in fragment.shape))
    offset = torch.Size(first[: len(fragment.shape)])
    chunk = ChunkStorageMetadata(offset, fragment.tensor.shape)
    properties = TensorProperties.create_from_tensor(fragment.tensor.detach())
    data = TensorWriteData(chunk, properties, torch.Size(fragment.shape))
    return WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data)


def _entry(item: WriteItem) -> str:
    """What a fragment is called in a file."""
    data = item.tensor_data
    assert data is not None
    if data.chunk.sizes == data.size:
        return item.index.fqn
    return entry_name(item.index.fqn, *(*data.chunk.offsets, 0)[:2])


@final
class _Planner(SavePlanner):
    """Every rank writes what it has, and all of it together must be every tensor, once."""

    def __init__(self, items: list[WriteItem]) -> None:
        self._items = items
        self._copies: Mapping[str, torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: Mapping[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._copies = state_dict

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        _, metadata = create_default_global_save_plan(all_plans, rewrite_index_hints=False)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            given, wanted = sum(x.sizes.numel() for x in tensor.chunks), tensor.size.numel()
            if given != wanted or _overlap([_box(x, tensor.size) for x in tensor.chunks]):
                raise CheckpointError(
                    f"the ranks have {given:,} elements of {name} to save, not each of its "
                    f"{wanted:,} once; please report this layout"
                )
        return all_plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._copies[_entry(write_item)]


def _box(chunk: ChunkStorageMetadata, whole: torch.Size) -> tuple[int, int, int, int]:
    """The rows of a fragment, first and past the last, and its columns."""
    (row, column), (height, width) = (*chunk.offsets, 0, 0)[:2], (*chunk.sizes, 1, 1)[:2]
    if any(
        first + n > size for first, n, size in zip(chunk.offsets, chunk.sizes, whole, strict=True)
    ):
        raise CheckpointError(
            f"a fragment of {list(chunk.sizes)} at {list(chunk.offsets)} does "
            f"not fit a tensor of {list(whole)}; please report this layout"
        )
    return row, row + height, column, column + width


def _overlap(boxes: list[tuple[int, int, int, int]]) -> bool:
    """Whether any two have an element in common."""
    open_: list[tuple[int, int, int, int]] = []
    for top, bottom, left, right in sorted(boxes):
        open_ = [box for box in open_ if box[1] > top]
        if any(left < box[3] and box[2] < right for box in open_):
            return True
        open_.append((top, bottom, left, right))
    return False


@final
class _Writer(StorageWriter):
    """Writes a rank's fragments into files of its own; on the first rank, commits all of them."""

    def __init__(self, whole: Whole, rank: int) -> None:
        self._whole, self._rank = whole, rank

    def failed(self, error: CheckpointException) -> CheckpointError | KeyboardInterrupt:
        """What went wrong on the first rank where something did; what lies aside goes.

        A KeyboardInterrupt on any of them is one on all.
        """
        if self._rank == 0:
            self._whole.clear()
        if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
            return KeyboardInterrupt()
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        text = str(cause) if isinstance(cause, CheckpointError) else repr(cause)
        return CheckpointError(f"rank {rank}: {text}")

    def reset(self, checkpoint_id: Any = None) -> None:
        """DCP names no other place."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: object) -> None:
        with self._whole.explained(0):
            if is_coordinator:
                self._whole.begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        tensors = {_entry(item): _tensor(planner.resolve_data(item)) for item in plan.items}
        files = plan_files(tensors, f"tensors-of-{self._rank:05d}") if tensors else []
        with self._whole.explained(sum(file.num_bytes() for file in files), "by this rank "):
            written = [self._whole.write(file) for file in files]
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(
            [WriteResult(MetadataIndex(one.name), one.entry.bytes, one) for one in written]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with self._whole.explained(0):
            self._whole.commit(result.storage_data for some in results for result in some)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return checkpoint_id is None


def _tensor(data: object) -> torch.Tensor:
    """What DCP may call bytes, but here never is."""
    assert isinstance(data, torch.Tensor)
    return data
