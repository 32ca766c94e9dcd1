"""What the list of live requests tells."""

import msgspec

from engine.live_requests import live_requests
from tests.scheduler.fake_device import make_request
from tests.scheduler.test_scheduler import Rig


def test_running_ones_then_the_queue_then_those_that_are_not_in_it_yet():
    rig = Rig(slots=2)
    for name, options in [("a", {"n": 2}), ("b", {"priority": 5}), ("c", {}), ("d", {"n": 2})]:
        request = make_request(name, [ord(name)] * 6, max_tokens=9, temperature=1.0, **options)
        rig.scheduler.add(msgspec.structs.replace(request, arrival=100.0))
    rig.step()
    rig.step()
    views = live_requests(rig.scheduler, [make_request("e", [1])], now=103.5)
    told = [(view.id, view.state, view.position) for view in views]
    assert told == [
        ("a", "running", None),
        ("c", "running", None),
        ("d", "waiting", 2),  # the second answer of a is before it
        ("b", "waiting", 4),
        ("e", "deferred", None),
    ]
    first = views[0]
    assert (first.prompt_tokens, first.generated_tokens, first.blocks) == (6, 2, 2)
    assert (first.age_seconds, views[3].priority) == (3.5, 5)


def test_ended_answers_are_not_counted():
    rig = Rig()
    rig.scheduler.add(make_request("a", [1, 2], max_tokens=9, n=2))
    rig.step()
    rig.scheduler.abort("a", index=0)
    [view] = live_requests(rig.scheduler, [], now=0.0)
    assert view.state == "waiting"
    rig.scheduler.abort("a")
    assert live_requests(rig.scheduler, [], now=0.0) == []
