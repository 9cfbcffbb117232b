"""Several machines without a scheduler: one launcher on each, machine 0 leads, files in the run folder carry orders.

    python -m bd3lm_scale.launch --nnodes 2 --node-rank 0 --master-addr host0 --nproc-per-node 8 -- train CONFIG
    python -m bd3lm_scale.launch --nnodes 2 --node-rank 1 --nproc-per-node 8 -- train CONFIG

The run folder is shared anyway, because of the checkpoints. The leader runs the same restart loop as everywhere; the
others start and end their ranks as runtime/machines/order.json says, and say in machine_0001.json that they live.
A machine that falls silent is left out of the next attempt, one that comes back is taken in.
"""

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from bd3lm_scale.launcher.local import Ended, LocalRanks, free_port
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import node_name, read_json, runtime_folder, write_json

log = get_logger(__name__)

POLL_SECONDS = 0.25
BEAT_SECONDS = 1.0
SILENT_SECONDS = 20.0
GATHER_SECONDS = 120.0
LEADER_SILENT_SECONDS = 60.0


class LeadingRanks:
    """Machine 0: its own ranks, and orders for the others."""

    can_requeue = False

    def __init__(self, run_dir: Path, num_machines: int, ranks_per_node: int, address: str) -> None:
        self.folder = machines_folder(run_dir)
        self.num_machines = num_machines
        self.ranks_per_node = ranks_per_node
        self.address = address
        self.own = LocalRanks(ranks_per_node)
        self._heard: dict[int, tuple[int, float]] = {}
        self._numbers: dict[str, int] = {}
        self._beats = 0
        self._has_gathered = False
        self._attempt = ""
        self._followers: list[int] = []
        self._first_bad: Ended | None = None
        self._own_ended: Ended | None = None
        self._order(action="wait")

    def usable_nodes(self) -> list[str]:
        """Machines that show signs of life; before the first attempt, waits two minutes for all of them."""
        deadline = time.monotonic() + (SILENT_SECONDS if self._has_gathered else GATHER_SECONDS)
        while True:
            self._order(action="wait")
            alive = [number for number in range(1, self.num_machines) if self._is_alive(number)]
            if len(alive) == self.num_machines - 1 or time.monotonic() > deadline:
                break
            time.sleep(BEAT_SECONDS)
        self._has_gathered = True
        self._numbers = {node_name(): 0}
        for number in alive:
            name = self._said(number).get("node", "")
            self._numbers[name if name not in self._numbers else f"{name}#{number}"] = number
        return list(self._numbers)

    def start(self, attempt: str, nodes: Sequence[str], command: Sequence[str]) -> None:
        """Order the machines to start their parts, and start machine 0's."""
        numbers = [self._numbers[node] for node in nodes]
        self._attempt, self._followers = attempt, numbers[1:]
        self._first_bad = self._own_ended = None
        port = free_port()
        world = len(numbers) * self.ranks_per_node
        self._order(action="run", machines=numbers, world_size=world, address=self.address, port=port)
        self.own.start_part(attempt, command, 0, world, self.address, port)

    def poll(self) -> Ended | None:
        """Done when every machine's ranks are; a machine that falls silent counts as fallen."""
        if self._own_ended is None:
            self._own_ended = self.own.poll()
        running = 0
        for number in self._followers:
            said = self._said(number)
            if said.get("wants_stop"):
                signal.raise_signal(signal.SIGTERM)
            ended = said.get("ended") if said.get("attempt") == self._attempt else None
            if ended is None and self._is_alive(number):
                running += 1
            elif ended is None:
                self._fell(Ended(ExitCode.FAILED, f"machine {number} ({said.get('node')}) fell silent"))
            elif ended["code"]:
                self._fell(Ended(ended["code"], f"machine {number} ({said.get('node')}), {ended['who']}"))
        if self._own_ended is not None and self._own_ended.code:
            self._fell(self._own_ended)
        if self._own_ended is None or running:
            return None
        return self._first_bad or Ended(0, "")

    def kill(self) -> None:
        """End the ranks of every machine."""
        self._order(action="kill")
        self.own.kill()

    def requeue(self) -> int:
        """There is no queue here."""
        raise RuntimeError("no scheduler to requeue with")

    def dismiss(self, code: int) -> None:
        """The run is over: the other launchers end with the same code."""
        self._order(action="end", code=code)

    def _fell(self, ended: Ended) -> None:
        if self._first_bad is None:
            self._first_bad = ended
            self._order(action="grace")
            self.own.end_after_grace()

    def _order(self, **order: object) -> None:
        self._beats += 1
        write_json(self.folder / "order.json", {"attempt": self._attempt, **order, "beats": self._beats})

    def _said(self, number: int) -> dict:
        return read_json(self.folder / f"machine_{number:04d}.json")

    def _is_alive(self, number: int) -> bool:
        """Whether its beats changed lately, by this machine's clock."""
        now, beats = time.monotonic(), int(self._said(number).get("beats", -1))
        known, since = self._heard.get(number, (beats, now - SILENT_SECONDS))  # a file of long ago proves nothing
        if beats != known or number not in self._heard:
            since = now if number in self._heard else since
            self._heard[number] = (beats, since)
        return now - self._heard[number][1] < SILENT_SECONDS


class Follower:
    """Any other machine's launcher: obeys the leader until it says that the run is over."""

    def __init__(self, run_dir: Path, number: int, ranks_per_node: int, command: Sequence[str]) -> None:
        self.number = number
        self.command = command
        self.ranks = LocalRanks(ranks_per_node)
        self.runtime = runtime_folder(run_dir)
        self.folder = machines_folder(run_dir)
        self.attempt = ""
        self.ended: dict | None = None
        self.wants_stop = False
        self._is_running = False
        self._beats = 0
        self._next_beat = 0.0
        self._leader = self._leaders_beats()  # what an earlier leader left proves nothing
        self._leader_at: float | None = None
        self._started = time.monotonic()

    def run(self) -> int:
        """Follow; the launcher's exit code."""
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._on_signal)
        while True:
            if self.wants_stop and not self._is_running:
                return int(ExitCode.STOPPED)
            if self._leader_is_alive():
                order = read_json(self.folder / "order.json")
                if order.get("action") == "end":
                    self.ranks.kill()
                    return int(order["code"])
                self._obey(order)
            elif self._is_running:
                log.error("the leader fell silent; ending this machine's ranks")
                self.ranks.kill()
            elif time.monotonic() - (self._leader_at or self._started) > GATHER_SECONDS:
                log.error("no leader: start the launcher with --node-rank 0 on the first machine")
                return int(ExitCode.FAILED)
            if self._is_running and (ended := self.ranks.poll()) is not None:
                self.ended, self._is_running, self._next_beat = {"code": ended.code, "who": ended.who}, False, 0.0
            self._beat()
            time.sleep(POLL_SECONDS)

    def _obey(self, order: dict) -> None:
        action, attempt = order.get("action"), order.get("attempt", "")
        if action == "run" and attempt != self.attempt and self.number in order["machines"]:
            first_rank = order["machines"].index(self.number) * self.ranks.ranks_per_node
            self.attempt, self.ended, self._is_running = attempt, None, True
            self.ranks.start_part(
                attempt, self.command, first_rank, order["world_size"], order["address"], order["port"]
            )
        elif self._is_running and (action == "kill" or attempt != self.attempt):
            self.ranks.kill()
        elif self._is_running and action == "grace":
            self.ranks.end_after_grace()

    def _leaders_beats(self) -> tuple:
        files = (self.folder / "order.json", self.runtime / "launcher.json")
        return tuple(read_json(path).get("beats") for path in files)

    def _leader_is_alive(self) -> bool:
        now = self._leaders_beats()
        if now != self._leader:
            self._leader, self._leader_at = now, time.monotonic()
        return self._leader_at is not None and time.monotonic() - self._leader_at < LEADER_SILENT_SECONDS

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.wants_stop = True

    def _beat(self) -> None:
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + BEAT_SECONDS
        self._beats += 1
        said = {"node": node_name(), "beats": self._beats, "attempt": self.attempt, "ended": self.ended}
        write_json(self.folder / f"machine_{self.number:04d}.json", {**said, "wants_stop": self.wants_stop})


def machines_folder(run_dir: Path) -> Path:
    """run_dir/runtime/machines, made if needed."""
    folder = runtime_folder(run_dir) / "machines"
    folder.mkdir(exist_ok=True)
    return folder
