"""A real process over a real state directory, killed with SIGKILL at random instants."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.state_rig import make_image

ROOT = Path(__file__).parents[2]
KILLS = 20

#: It says which granules it finds dirty; then what it is about to do, and that it has done it.
GUEST = """
import random, sys
from pathlib import Path
import trio
from tests.helpers.state_rig import DATA, GRANULE, SIZE, daemon, dirty
from blockd.state.host import this_boot

async def main(state, image, seed):
    random.seed(seed)
    async with daemon(state, image, boot=this_boot()) as one, trio.open_nursery() as nursery:
        node = await one.node()
        assert one.heard.recovered == [], one.heard
        if not node.bitmaps.list():
            await one.add(node)
        print("found", *dirty(node), flush=True)
        async def checkpoints():
            while True:
                await one.checkpoint(node)
        nursery.start_soon(checkpoints)
        while True:
            if random.random() < 0.02:
                print("clear", flush=True)
                node.bitmaps.get("b").clear()
                assert await one.state.keep(node)
                print("cleared", flush=True)
            granule = random.randrange(SIZE // GRANULE)
            print("write", granule, flush=True)
            await node.write(granule * GRANULE, DATA)
            print("written", granule, flush=True)

trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
"""


@dataclass
class Truth:
    """What must be dirty, and what may be, by what the processes said before they were killed."""

    must: set[int] = field(default_factory=set)
    may: set[int] = field(default_factory=set)
    writes: int = 0

    def hear(self, line: str) -> None:
        match line.split():
            case ["found", *granules]:
                found = set(map(int, granules))
                assert self.must <= found <= self.may
                self.must, self.may = set(found), set(found)
            case ["clear"]:
                # Until it is kept, what was before may come back.
                self.must = set()
            case ["cleared"]:
                self.may = set()
            case ["write", granule]:
                self.may.add(int(granule))
            case ["written", granule]:
                self.must.add(int(granule))
                self.writes += 1
            case [word, *_]:
                raise AssertionError(word)


def test_promise_2_sigkill_at_random_instants(tmp_path: Path) -> None:
    chance, truth = random.Random(1), Truth()
    image = make_image(tmp_path / "disk.img")
    for kill in range(KILLS):
        arguments = [str(tmp_path / "state"), str(image), str(kill)]
        with subprocess.Popen(
            [sys.executable, "-c", GUEST, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            truth.hear(process.stdout.readline())
            for _ in range(chance.randrange(150)):
                truth.hear(process.stdout.readline())
            process.kill()
            for line in process.stdout:
                if line.endswith("\n"):
                    truth.hear(line)
    assert truth.writes > KILLS
