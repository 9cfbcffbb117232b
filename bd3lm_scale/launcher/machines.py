"""Several machines without a scheduler: one launcher on each, machine 0 leads, files in the run folder carry orders.

    python -m bd3lm_scale.launch --nnodes 2 --node-rank 0 --master-addr host0 --nproc-per-node 8 -- train CONFIG
    python -m bd3lm_scale.launch --nnodes 2 --node-rank 1 --nproc-per-node 8 -- train CONFIG

The run folder is shared anyway, because of the checkpoints. The leader runs the same restart loop as everywhere; the
others start and end their ranks as runtime/machines/order.json says, and count seconds in machine_0001.json.
A machine that falls silent is left out of the next attempt, one that comes back is taken in.
"""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bd3lm_scale.launcher.local import LocalRanks, RanksExit, free_port
from bd3lm_scale.runtime.durable import make_folder
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.lock import RunLock, owner_of, start_of
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import node_name, read_json, try_write_json

log = get_logger(__name__)

POLL_SECONDS = 0.25
BEAT_SECONDS = 1.0
SILENT_SECONDS = 20.0
GATHER_SECONDS = 120.0
LEADER_SILENT_SECONDS = 60.0


class LeadingRanks:
    """Machine 0: its own ranks, and orders for the others."""

    can_requeue = False

    def __init__(self, lock: RunLock, num_machines: int, ranks_per_node: int, address: str) -> None:
        """Args: lock is the run's; orders are given only while this launcher holds it."""
        self.lock = lock
        self.folder = lock.run_dir / "runtime" / "machines"
        self.num_machines = num_machines
        self.ranks_per_node = ranks_per_node
        self.address = address
        self.own = LocalRanks(ranks_per_node)
        self._heard: dict[int, tuple[int, float]] = {}
        self._numbers: dict[str, int] = {}
        self._beats = 0
        self._last_order: dict[str, object] = {"action": "wait"}
        self._is_ordered = True
        self._has_gathered = False
        self._attempt = ""
        self._followers: list[int] = []
        self._first_bad: RanksExit | None = None
        self._own_exit: RanksExit | None = None

    def usable_nodes(self) -> list[str] | None:
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
            name = self._read_status(number).get("node", "")
            self._numbers[name if name not in self._numbers else f"{name}#{number}"] = number
        return list(self._numbers)

    def start(self, attempt: str, nodes: Sequence[str], command: Sequence[str]) -> None:
        """Order the machines to start their parts, and start machine 0's."""
        numbers = [self._numbers[node] for node in nodes]
        self._attempt, self._followers = attempt, numbers[1:]
        self._first_bad = self._own_exit = None
        port = free_port()
        world = len(numbers) * self.ranks_per_node
        self._order(action="run", machines=numbers, world_size=world, address=self.address, port=port)
        self.own.start_part(attempt, command, 0, world, self.address, port)

    def poll(self) -> RanksExit | None:
        """Done when every machine's ranks are; a machine that falls silent counts as failed."""
        if not self._is_ordered:
            self._order(**self._last_order)
        if self._own_exit is None:
            self._own_exit = self.own.poll()
        running = 0
        for number in self._followers:
            status = self._read_status(number)
            if status.get("wants_stop"):
                signal.raise_signal(signal.SIGTERM)
            ended = status.get("ended") if status.get("attempt") == self._attempt else None
            if ended is None and self._is_alive(number):
                running += 1
            elif ended is None:
                self._failed(RanksExit(ExitCode.FAILED, f"machine {number} ({status.get('node')}) fell silent"))
            elif ended["code"]:
                self._failed(RanksExit(ended["code"], f"machine {number} ({status.get('node')}), {ended['who']}"))
        if self._own_exit is not None and self._own_exit.code:
            self._failed(self._own_exit)
        if self._own_exit is None or running:
            return None
        return self._first_bad or RanksExit(0, "")

    def kill(self) -> None:
        """End the ranks of every machine."""
        self._order(action="kill")
        self.own.kill()

    def requeue(self, is_owner: Callable[[], bool]) -> int:
        """There is no queue here."""
        raise RuntimeError("no scheduler to requeue with")

    def dismiss(self, code: int) -> None:
        """The run is over: let the other launchers end with the same code."""
        self._order(action="end", code=code)

    def _failed(self, ended: RanksExit) -> None:
        if self._first_bad is None:
            self._first_bad = ended
            self._order(action="grace")
            self.own.end_after_grace()

    def _order(self, **order: object) -> None:
        """Write an order in the name of this start; `poll` repeats one that a full disk did not take."""
        self._last_order = order
        if not self.lock.is_held():
            return
        self._beats += 1
        content = {"start": start_of(self.lock.attempt), "attempt": self._attempt, **order, "beats": self._beats}
        self._is_ordered = try_write_json(make_folder(self.folder) / "order.json", content)

    def _read_status(self, number: int) -> dict:
        return read_json(self.folder / f"machine_{number:04d}.json")

    def _is_alive(self, number: int) -> bool:
        """Whether its beats changed lately, by this machine's clock."""
        now, beats = time.monotonic(), int(self._read_status(number).get("beats", -1))
        known, since = self._heard.get(number, (beats, now - SILENT_SECONDS))  # a file of long ago proves nothing
        if beats != known or number not in self._heard:
            since = now if number in self._heard else since
            self._heard[number] = (beats, since)
        return now - self._heard[number][1] < SILENT_SECONDS


class Follower:
    """Any other machine's launcher: carries out the leader's orders until one says that the run is over."""

    def __init__(self, run_dir: Path, number: int, ranks_per_node: int, command: Sequence[str]) -> None:
        self.number = number
        self.command = command
        self.ranks = LocalRanks(ranks_per_node)
        self.folder = make_folder(run_dir / "runtime" / "machines")
        self.attempt = ""
        self.ended: dict | None = None
        self.wants_stop = False
        self._is_running = False
        self._beats = 0
        self._next_beat = 0.0
        self.run_dir = run_dir
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
                order = self._order_of_owner()
                if order.get("action") == "end":
                    self.ranks.kill()
                    return int(order["code"])
                self._carry_out(order)
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

    def _carry_out(self, order: dict) -> None:
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

    def _order_of_owner(self) -> dict:
        """The leader's order, unless it is an earlier leader's."""
        order = read_json(self.folder / "order.json")
        owner = start_of(str(owner_of(self.run_dir).get("attempt")))
        return order if owner and order.get("start") == owner else {}

    def _leaders_beats(self) -> tuple:
        return read_json(self.folder / "order.json").get("beats"), owner_of(self.run_dir).get("beat")

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
        status = {"node": node_name(), "beats": self._beats, "attempt": self.attempt, "ended": self.ended}
        try_write_json(self.folder / f"machine_{self.number:04d}.json", {**status, "wants_stop": self.wants_stop})
