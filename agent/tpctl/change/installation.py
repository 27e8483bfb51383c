"""An installation as a value: the steps by which a policy takes the place of what stood there before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpctl.change import before, crossing, device_routes, draining, ended, loopback, removal, routing
from tpctl.change.steps import Step
from tpctl.engines import leftovers, registry
from tpctl.engines.base import Applied, Engine, Footprint, Removal
from tpctl.persist import in_step
from tpctl.record import state
from tpctl.spec.policy import Family

if TYPE_CHECKING:
    from tpctl.persist.firewalld import Change


class Installation:
    """What a record says, in place of `previous`, or of what stands there without a record."""

    def __init__(
        self,
        engine: Engine[Any],
        record: state.State,
        previous: state.State | None,
        renewal: state.Renewal | None = None,
    ) -> None:
        """Look at what is there; `renewal` is that of the record, if it has begun.

        Raises HostError or ApplyError before anything is touched.
        """
        self._engine = engine
        self._record = record
        self._policy = record.policy
        self._previous = previous
        self._renewal = renewal
        self._engines = registry.holding(previous.options if previous else None, engine)
        self._older = _older(engine, record, previous)
        self._in_file = in_step.change(record, previous)
        self._was_in_file: Change | None = None
        self._stood = before.Before(previous) if previous else before.unrecorded()
        self._ends_routes = not self._policy.inbound.is_transparent and _may_have_routes(previous)
        self._had_answers = self._ends_routes and leftovers.holds_answers()
        self._had_routes: frozenset[Family] | None = None
        self._had_device_routes: frozenset[device_routes.DeviceRoute] | None = None
        self._had_chains: Footprint = {}
        self._crosses = crossing.is_crossing(engine, self._stood)
        self._at_first = crossing.unguarded(self._policy) if self._crosses else self._policy
        self._was_kumactls = False
        self._applied = Applied()
        self._others = Removal()
        self.left: list[str] = []
        """Notices of what stays for connections that run."""

    def steps(self) -> tuple[Step, ...]:
        """The order of an install.

        What the new rules count on comes before them, what only the old ones counted on goes after them. The last step
        is the commit point: until then the record says that an install is under way.
        """
        return (
            Step(
                "the record says that it begins",
                self._begin,
                self._not_begun,
                changes_kernel=False,
                undone_if_all_went=True,
            ),
            Step("::6 that came with kumactl is marked", self._mark, self._unmark, True, changes_kernel=False),
            Step("::6 is there", self._add_address, self._remove_address, changes_kernel=False),
            Step(
                "bound sockets reach loopback",
                self._route_devices,
                self._restore_device_routes,
                True,
                changes_kernel=False,
            ),
            Step("what TPROXY marks comes back", self._add_routes, self._remove_routes, True, changes_kernel=False),
            Step(
                "connections that old TPROXY rules serve go on",
                self._hold_answers,
                self._release_answers,
                True,
                changes_kernel=False,
            ),
            Step("base chains are known", self._note_base_chains, self._end_base_chains, changes_kernel=False),
            Step(
                "the guard of the engine that goes stands aside",
                self._put_guard_aside,
                self._put_guard_back,
                True,
                changes_kernel=False,
            ),
            Step("the rules", self._apply, self._take_back),
            Step("the rules of other engines go", self._remove_others),
            Step("the guard", self._guard, self._stand_aside, True),
            Step("routes that no rule needs go", self._end_routes, self._bring_routes_back, True, changes_kernel=False),
            Step("::6 that no rule needs goes", self._end_address, self._bring_address_back),
            Step("firewalld's files", self._store, self._store_as_before, True),
            Step("conntrack forgets connections that are over", self._forget),
            Step("the record says that it is done", self._finish),
        )

    @property
    def replaced(self) -> tuple[str, ...]:
        """What was there before and is not any more, in words."""
        upgraded = (f"what tpctl {self._older} installed",) if self._older else ()
        return (*upgraded, *self._applied.replaced, *self._others.removed)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the engine has to say."""
        return self._applied.notices

    def _begin(self) -> bool:
        self._renewal = self._renewal or state.begin(self._record)
        return True

    def _not_begun(self, _done: object) -> None:
        if self._renewal:
            self._renewal.undo()

    def _finish(self) -> None:
        assert self._renewal is not None
        self._renewal.finish()

    def _mark(self) -> None:
        is_ours = self._previous is not None and Family.IPV6 in self._previous.policy.families
        if not is_ours and draining.came_with_kumactl(self._policy.loopback, self._engines):
            self._was_kumactls = True
            loopback.mark(self._policy.loopback)

    def _unmark(self, _done: object) -> None:
        if self._was_kumactls:
            loopback.bring_back(self._policy.loopback, loopback.OTHERS)

    def _add_address(self) -> bool:
        return Family.IPV6 in self._policy.families and loopback.add(self._policy.loopback)

    def _remove_address(self, _done: object) -> None:
        loopback.remove(self._policy.loopback)

    def _route_devices(self) -> None:
        self._had_device_routes = device_routes.held()
        if families := device_routes.needed(self._policy):
            device_routes.add(self._policy.loopback, families)

    def _restore_device_routes(self, _done: object) -> None:
        if self._had_device_routes is not None:
            device_routes.restore(self._had_device_routes)

    def _add_routes(self) -> None:
        self._had_routes = routing.present()
        if self._policy.inbound.is_transparent:
            routing.add(self._policy.loopback, self._policy.families)

    def _remove_routes(self, _done: object) -> None:
        if self._had_routes is not None:
            routing.remove(frozenset(Family) - self._had_routes)

    def _hold_answers(self) -> None:
        if self._ends_routes:
            removal.hold_answers(self._previous)

    def _release_answers(self, _done: object) -> None:
        if self._ends_routes and not self._had_answers:
            leftovers.release_answers()

    def _note_base_chains(self) -> bool:
        """Which there are: iptables-nft makes those that rules need, and leaves them when the rules are put back."""
        if self._engine.name != "iptables":
            return False
        is_new = self._previous is None or "iptables" not in self._previous.footprints
        self._had_chains = self._record.footprints["iptables"] if is_new else self._engine.footprint()
        return True

    def _end_base_chains(self, _done: object) -> None:
        from tpctl.engines import snapshot

        snapshot.end_empty_chains(self._had_chains)

    def _put_guard_aside(self) -> bool:
        return self._crosses and crossing.put_guard_aside(self._stood.record)

    def _put_guard_back(self, _done: object) -> None:
        if self._crosses:
            crossing.put_guard_back(self._stood.record)

    def _apply(self) -> bool:
        carry_out = crossing.carry_out_across if self._crosses else crossing.carry_out
        self._applied = carry_out(self._engine, self._at_first)
        return True

    def _guard(self) -> bool:
        if self._at_first != self._policy:
            crossing.carry_out(self._engine, self._policy)
        return self._at_first != self._policy

    def _stand_aside(self, _done: object) -> None:
        if self._at_first != self._policy:
            crossing.carry_out(self._engine, self._at_first)

    def _take_back(self, _done: object) -> None:
        """Put what stood there before in place of the rules that were just installed."""
        footprints = self._record.footprints
        stands = None
        if self._stood.record:
            takes_over = registry.select(self._stood.record.options).engine
            policy = self._stood.record.policy
            crossing.carry_out(takes_over, crossing.unguarded(policy) if self._crosses else policy)
            stands = takes_over.name
        elif self._stood.holdings:
            before.put_back(self._stood, footprints.get("iptables"))
            stands = "iptables"
        if stands != self._engine.name:
            self._engine.remove(footprint=footprints.get(self._engine.name), draining=False)

    def _remove_others(self) -> None:
        self._others = draining.remove_others(self._engine, self._engines, self._record.footprints)
        self.left += self._others.notices

    def _end_routes(self) -> None:
        """Those of TPROXY, of families that are not redirected any more, and of bound sockets."""
        if self._ends_routes:
            self.left += removal.end_routes()[1]
        elif self._policy.inbound.is_transparent:
            leftovers.release_answers()  # the rules are there again, and do the work of what an earlier end left
            routing.remove(frozenset(Family) - self._policy.families)
        if not device_routes.needed(self._policy):
            removal.end_device_routes()

    def _bring_routes_back(self, _done: object) -> None:
        """Before the rules that count on them."""
        stood = self._previous.policy if self._previous else self._policy
        routing.add(stood.loopback, self._had_routes or ())
        self._restore_device_routes(None)

    def _end_address(self) -> bool:
        if Family.IPV6 in self._policy.families:
            return False
        gone, running = removal.end_address(self._policy.loopback)
        self.left += running
        return bool(gone)

    def _bring_address_back(self, _done: object) -> None:
        loopback.add(self._policy.loopback)

    def _store(self) -> None:
        if self._in_file:
            self._was_in_file = self._in_file.opposite()
            self._in_file.carry_out()
        else:
            in_step.tidy(self._record)

    def _store_as_before(self, _done: object) -> None:
        if self._was_in_file:
            self._was_in_file.carry_out()

    def _forget(self) -> None:
        """Before the record says that all is done: killed here, the next install does it again."""
        if self._engine.name != "ebpf":  # whose programs do not ask conntrack
            ended.forget()


def _may_have_routes(previous: state.State | None) -> bool:
    return (previous is None or previous.policy.inbound.is_transparent) and bool(routing.present())


def _older(engine: Engine[Any], record: state.State, previous: state.State | None) -> str | None:
    """The other version of tpctl that installed what stands there now: by the record, or else by the rules."""
    found = previous.version if previous else engine.inspect(None).version
    return found if found != record.version else None
