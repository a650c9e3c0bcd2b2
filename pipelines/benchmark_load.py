"""The loader against the page cache, the codec alone and other ways of reading the same store, in turns, in one run."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import Field

from mae_core.evaluate import Pretraining
from mae_core.loader import LoaderSettings, Stream
from mae_core.mae import MaskedAutoencoder
from mae_core.optim import learning_rate, make_optimiser
from mae_core.parallel import Parallel
from mae_core.settings import Settings, to_plain
from mae_core.shards import StoreError
from mae_core.store import TileStore
from modalities.catalogue import scan
from modalities.raster import RasterSettings
from pipelines.benchmark_ceiling import write_image
from pipelines.benchmark_machine import description
from pipelines.benchmark_readers import (
    drawn_crops,
    forget_files,
    installed,
    read_bytes,
    read_files,
    tensorstore_shards,
    unpack_all,
    zarr_crops,
    zarr_shards,
    zarrs_pipeline,
)
from pipelines.benchmark_report import busy_note, middle
from pipelines.command_line import run
from pipelines.preparation import PrepareSettings, prepare
from pipelines.prepare import store_attributes
from pipelines.pretrain import PretrainRecipe, resolved
from pipelines.pretrain_start import make_normaliser
from pipelines.progress import console, table
from pipelines.run_folder import RunError, write_json
from pipelines.store_facts import codec_words

DESCRIPTION = (
    "load: a store through our loader, against reading its files, unpacking its chunks and reading it with other libraries, in one run; "
    "ratios, not absolute rates, are to be compared"
)
CEILING, NAIVE = "unpacking alone", "zarr, crop by crop"
SMALLEST_S = 0.2
"""A turn reads the store as often as this takes at least."""

PROCESS_S = 1.0
"""How long processes load side by side."""


class LoadSettings(Settings):
    """Settings of `benchmark load`."""

    out: Path | None = Field(None, description="JSON file to write the figures to")
    store: Path | None = Field(None, description="Folder of a tile store; none: one is made of smooth fields and noise")
    size: int = Field(2048, ge=256, description="Rows and columns of the image that is made where no store is given")
    bands: int = Field(10, ge=1, description="Its bands")
    threads: tuple[int, ...] = Field((1, 2), min_length=1, description="Numbers of the loader's threads")
    crops_per_tile: tuple[int, ...] = Field((1, 2, 4), min_length=1, description="Crops drawn from a tile; the first is compared")
    batch_size: int = Field(64, ge=1, description="Samples of a batch")
    rounds: int = Field(5, ge=1, description="Turns; in each, everything is done once")
    num_naive_crops: int = Field(200, ge=1, description="Crops that are read one by one in a turn")
    memory_epochs: int = Field(20, ge=3, description="Epochs over which memory is watched")
    step_seconds: float = Field(10.0, ge=0, description="How long training steps are fed from the store; 0 leaves it out")
    recipe: PretrainRecipe = PretrainRecipe()
    scratch: Path | None = Field(None, description="Where a store is made and removed again (default: the system's place for such)")


class Bench:
    """A store and the ways of reading it."""

    def __init__(self, settings: LoadSettings, store: TileStore) -> None:
        self.settings = settings
        self.store = store
        self.rows = store.rows("train")
        self.parallel = Parallel(0, 1, torch.device("cpu"))
        self.tile_bytes = sum(values.nbytes for values in store.empty(1).values())
        self.packed = store.fetch(self.rows)
        self.packed_bytes = sum(len(chunk) for chunks in self.packed.values() for chunk in chunks.values() if isinstance(chunk, memoryview))
        if len(self.rows) < 2 * settings.batch_size:
            raise RunError(f"the store has {len(self.rows)} training tiles, too few for batches of {settings.batch_size}")

    def stream(self, threads: int, crops: int) -> Stream:
        """Our loader."""
        loader = LoaderSettings(global_batch_size=self.settings.batch_size, num_threads=threads, crops_per_tile=crops, prefetch=threads + 2)
        return Stream(self.store, self.rows, loader, 0, self.parallel)

    def load(self, threads: int, crops: int) -> float:
        """Samples a second of our loader."""
        stream, size = self.stream(threads, crops), self.settings.batch_size
        epoch = max(1, len(self.rows) * crops // size)
        steps = stream.steps(0, 1 << 40)
        next(steps)  # threads are started and the first window is on its way
        done, began = 0, perf_counter()
        while done < epoch or perf_counter() - began < SMALLEST_S:
            next(steps)
            done += 1
        seconds = perf_counter() - began
        steps.close()
        return done * size / seconds

    def processes(self, number: int) -> float:
        """Samples a second of spawned processes that load a share each with one thread, all together.

        What they load stays with them: handing it over would cost more, so this is the most that worker processes could give.
        """
        batch = self.settings.batch_size // number
        shares = [(self.store.label, batch, rank, number) for rank in range(number)]
        with multiprocessing.get_context("spawn").Pool(number) as pool:
            pool.map(_share_rate, shares, chunksize=1)  # imports, and the page cache
            return sum(pool.map(_share_rate, shares, chunksize=1))

    def ceiling(self, threads: int) -> float:
        """Tiles a second that are unpacked from memory into memory of a batch."""
        rooms = [self.store.empty(self.settings.batch_size) for _ in range(threads)]
        return len(self.rows) / usual_time(partial(unpack_all, self.store, self.rows, self.packed, rooms))

    def naive(self, threads: int) -> float:
        """Crops a second through zarr-python, each by itself."""
        crop = resolved(self.settings.recipe, self.store).crop
        crops = drawn_crops(self.store, crop, self.settings.num_naive_crops, 0)
        return len(crops.boxes) / usual_time(partial(zarr_crops, crops, threads))

    def others(self, threads: int) -> dict[str, Callable[[], float]]:
        """Tiles a second by other ways of reading whole shards; those whose library is not installed are left out."""
        num_tiles = len(self.store)

        def through_zarrs() -> float:
            with zarrs_pipeline():
                return num_tiles / usual_time(partial(zarr_shards, self.store, threads))

        ways: dict[str, Callable[[], float]] = {
            "zarr, shard by shard": lambda: num_tiles / usual_time(partial(zarr_shards, self.store, threads))
        }
        if installed("zarrs"):
            ways["zarrs, shard by shard"] = through_zarrs
        if installed("tensorstore"):
            ways["tensorstore, shard by shard"] = lambda: num_tiles / usual_time(partial(tensorstore_shards, self.store, threads))
        return ways

    def race(self) -> dict[str, list[float]]:
        """Tiles (or samples) a second of each way in each round."""
        most, rates = max(self.settings.threads), dict[str, list[float]]()
        ways: dict[str, Callable[[], float]] = {CEILING: partial(self.ceiling, most)}
        for threads in self.settings.threads:
            ways[_ours(threads, self.settings.crops_per_tile[0])] = partial(self.load, threads, self.settings.crops_per_tile[0])
        for crops in self.settings.crops_per_tile[1:]:
            ways[_ours(most, crops)] = partial(self.load, most, crops)
        ways |= {NAIVE: partial(self.naive, 1), f"{NAIVE}, {most} threads": partial(self.naive, most)} | self.others(most)
        for way in ways.values():
            way()
        for _ in range(self.settings.rounds):
            for name, way in ways.items():
                rates.setdefault(name, []).append(way())
        return rates

    def raw(self) -> dict[str, float]:
        """Bytes a second of the files: from the page cache and, where the system can be asked to forget them, from the disk."""
        total = read_files(self.store, self.rows)
        found = {"page cache": total / usual_time(lambda: read_files(self.store, self.rows))}
        if forget_files(self.store, self.rows):
            began = perf_counter()
            read_files(self.store, self.rows)
            found["after the cache was told to forget"] = total / (perf_counter() - began)
        return found

    def amplification(self) -> float | None:
        """Bytes read from files over packed bytes of the tiles that were asked for, over an epoch."""
        before = read_bytes()
        num_steps = len(self.rows) // self.settings.batch_size
        for _ in self.stream(max(self.settings.threads), 1).steps(0, num_steps):
            pass
        after = read_bytes()
        share = num_steps * self.settings.batch_size / len(self.rows)
        return None if before is None or after is None else (after - before) / (self.packed_bytes * share)

    def memory(self) -> dict[str, float]:
        """Resident bytes after the third and the last of many epochs, and what batches and windows take by the settings."""
        process, stream = psutil.Process(), self.stream(max(self.settings.threads), 1)
        per_epoch = len(self.rows) // self.settings.batch_size
        seen = []
        for step, _ in enumerate(stream.steps(0, per_epoch * self.settings.memory_epochs)):
            if (step + 1) % per_epoch == 0:
                seen.append(process.memory_info().rss)
        return {"epochs": len(seen), "third": seen[2], "last": seen[-1], "growth": seen[-1] / seen[2] - 1}

    def step(self) -> dict[str, float]:
        """What training pays for its data: share of the time that it waits, and its rate against steps on a batch in memory."""
        recipe = resolved(self.settings.recipe, self.store)
        torch.manual_seed(0)
        model = MaskedAutoencoder(recipe.model, self.store.channels)
        optimiser = make_optimiser(model, recipe.optim, learning_rate(recipe.optim, self.settings.batch_size))
        normaliser = make_normaliser(self.store, recipe.crop, 0, recipe.augment)
        none = np.empty(0, np.int64)
        task = Pretraining(recipe.model, recipe.hiding, normaliser, 0, self.store, none, self.settings.batch_size, self.parallel)
        steps = self.stream(max(self.settings.threads), 1).steps(0, 1 << 40)
        fixed = next(steps)[0][0]

        def update(raw: Any) -> None:
            loss = task.loss(model, raw, 0.0)
            (loss.total / loss.nominal).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        seconds, waiting, counts = {"loader": 0.0, "memory": 0.0}, 0.0, {"loader": 0, "memory": 0}
        for _ in range(2):
            update(fixed)
        while min(seconds.values()) < self.settings.step_seconds:
            for kind in ("loader", "memory"):
                began = perf_counter()
                for _ in range(4):
                    raw, waited = fixed, 0.0
                    if kind == "loader":
                        (raw,), waited = next(steps)
                    update(raw)
                    waiting += waited
                    counts[kind] += 1
                seconds[kind] += perf_counter() - began
        steps.close()
        rates = {kind: counts[kind] * self.settings.batch_size / seconds[kind] for kind in counts}
        return {
            "waiting_fraction": waiting / seconds["loader"],
            "rate_of_memory": rates["loader"] / rates["memory"],
            "samples_per_second": rates["loader"],
        }


def usual_time(work: Callable[[], Any]) -> float:
    """Seconds of some work, done as often as makes the clock and the start of threads not count."""
    times: list[float] = []
    began = perf_counter()
    while not times or perf_counter() - began < SMALLEST_S:
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return median(times)


def _share_rate(share: tuple[str, int, int, int]) -> float:
    """Samples a second of one process's share of the stream."""
    address, batch, rank, world = share
    store = TileStore.open(address, "sizes")
    loader = LoaderSettings(global_batch_size=batch * world, num_threads=1, prefetch=3)
    steps = Stream(store, store.rows("train"), loader, 0, Parallel(rank, world, torch.device("cpu"))).steps(0, 1 << 40)
    next(steps)
    done, began = 0, perf_counter()
    while perf_counter() - began < PROCESS_S:
        next(steps)
        done += 1
    rate = done * batch / (perf_counter() - began)
    steps.close()
    return rate


def _ours(threads: int, crops: int) -> str:
    return f"ours, {threads} thread{'s' if threads > 1 else ''}, {crops} crop{'s' if crops > 1 else ''} a tile"


def over(rates: Mapping[str, Sequence[float]], ours: str, other: str) -> dict[str, float]:
    """How many times as fast one way is as another: the middle of the rounds, the least and the most."""
    each = [one / two for one, two in zip(rates[ours], rates[other], strict=True)]
    return middle(each)


def make_store(settings: LoadSettings, folder: Path) -> TileStore:
    """A store of an image that packs about as a satellite image does."""
    write_image(folder / "image.tif", settings.size, settings.bands, 256)
    reader = RasterSettings(kind="raster")
    plan = PrepareSettings.model_validate({"tile": (128, 128), "num_workers": 0, "split": {"unit": "block", "val_fraction": 0.1}})
    prepare(scan(folder / "image.tif", reader), folder / "store", plan, attributes=store_attributes(reader, 2))
    return TileStore.open(folder / "store", "sizes")


def work(settings: LoadSettings) -> int:
    """Do it."""
    machine = description(torch.device("cpu"))
    with ExitStack() as stack:
        if settings.store is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="terravox-", dir=settings.scratch)))
            store = make_store(settings, folder)
        else:
            store = TileStore.open(settings.store, "sizes")
        bench = Bench(settings, store)
        rates = bench.race()
        ours = _ours(max(settings.threads), settings.crops_per_tile[0])
        naive = max((NAIVE, f"{NAIVE}, {max(settings.threads)} threads"), key=lambda name: median(rates[name]))
        found = {
            "verb": "benchmark",
            "subject": "load",
            "machine": machine,
            "store": {
                "digest": store.digest,
                "training_tiles": len(bench.rows),
                "tile_bytes": bench.tile_bytes,
                "packed_share": bench.packed_bytes / (bench.tile_bytes * len(bench.rows)),
                "codec": codec_words(store.arrays["pixels"].codec),
                "dtype": str(store.dtype),
                "space": list(store.space),
                "channels": len(store.channels),
            },
            "tiles_per_second": rates,
            "raw_bytes_per_second": bench.raw(),
            "ours_over_ceiling": over(rates, ours, CEILING),
            "ours_over_naive": over(rates, ours, naive),
            "processes_over_threads": bench.processes(max(settings.threads)) / median(rates[ours]),
            "read_amplification": bench.amplification(),
            "memory": bench.memory(),
            "step": bench.step() if settings.step_seconds else None,
            "libraries": {name: installed(name) for name in ("zarr", "zarrs", "tensorstore", "numcodecs")},
            "config": to_plain(settings),
        }
    tell(found, ours, naive)
    if settings.out is not None:
        write_json(settings.out, found)
        console.print(f"written to {settings.out}")
    return 0


def tell(found: Mapping[str, Any], ours: str, naive: str) -> None:
    """Print all of it."""
    store, size = found["store"], found["store"]["tile_bytes"]
    rows = []
    for name, each in found["tiles_per_second"].items():
        against = over(found["tiles_per_second"], name, CEILING)
        share = f"{against['median']:.2f} ({against['least']:.2f}–{against['most']:.2f})"
        rows.append((name, f"{median(each):.0f}", f"{median(each) * size / 1e9:.2f}", share))
    shape = "×".join(map(str, store["space"]))
    title = (
        f"loading {store['training_tiles']} tiles of {store['channels']} × {shape} {store['dtype']}, packed to {store['packed_share']:.0%}"
    )
    table(title, ("way", "samples/s", "GB/s unpacked", "of unpacking alone"), rows)
    for name, rate in found["raw_bytes_per_second"].items():
        console.print(f"reading the files, {name}: {rate / 1e9:.2f} GB/s of packed bytes")
    if found["read_amplification"] is not None:
        console.print(f"bytes read for each packed byte that is wanted: {found['read_amplification']:.2f}")
    console.print(f"as many spawned processes, nothing handed over, load at {found['processes_over_threads']:.2f} of the rate of threads")
    memory = found["memory"]
    console.print(
        f"resident memory after 3 and {memory['epochs']:.0f} epochs: {memory['third'] / 1e6:.0f} and {memory['last'] / 1e6:.0f} MB "
        f"({memory['growth']:+.1%})"
    )
    if found["step"] is not None:
        step = found["step"]
        console.print(
            f"feeding training steps: {step['waiting_fraction']:.1%} of the time waiting, {step['rate_of_memory']:.2f} of the rate "
            f"of steps on a batch in memory"
        )
    for words, key in ((f"{ours} over {CEILING}", "ours_over_ceiling"), (f"{ours} over {naive}", "ours_over_naive")):
        each = found[key]
        console.print(f"{words}: {each['median']:.2f} ({each['least']:.2f}–{each['most']:.2f})")
    if note := busy_note(found["machine"]):
        console.print(note)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subject; its exit code."""
    return run("benchmark", LoadSettings, work, description=DESCRIPTION, expected=(RunError, StoreError), argv=argv)
