"""``/metrics``, asked of real masters and read with Prometheus' own parsers."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
from collections.abc import Iterable

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from scenario import DEADLINE_S, HOT, ROOT, Client, Load, Segue, free_port, supervised, unix_call

from segue.supervisor.metrics import FAMILIES
from segue.supervisor.totals import KINDS, Followed
from segue.supervisor.underway import Outcome

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def raw(master: Segue, accept: str = "text/plain") -> tuple[str, str]:
    """Content type and text."""
    connection = http.client.HTTPConnection("localhost", timeout=DEADLINE_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(DEADLINE_S)
    connection.sock.connect(master.control)
    try:
        connection.request("GET", "/metrics", headers={"Accept": accept})
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def samples(families: Iterable[Metric]) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def scrape(master: Segue) -> Samples:
    return samples(text_string_to_metric_families(raw(master)[1]))


def value(found: Samples, name: str, /, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def total(found: Samples, name: str) -> float:
    return sum(each for (key, _), each in found.items() if key == name)


def counters(found: Samples) -> Samples:
    """Without those of single workers, which end with them."""
    return {
        key: each
        for key, each in found.items()
        if re.search("_(total|bucket|count|sum)$", key[0]) and "worker" not in dict(key[1])
    }


def assert_monotonic(before: Samples, after: Samples) -> None:
    for key, each in counters(before).items():
        if not key[0].startswith(("python_", "process_")):
            assert after.get(key, -1) >= each, key


def settled(master: Segue, count: int) -> Samples:
    """A scrape, once so many responses are in the figures, which workers write down twice a second."""
    seen: list[Samples] = []

    def reached(_: object) -> bool:
        seen.append(scrape(master))
        return total(seen[-1], "segue_http_responses_total") >= count

    master.wait_status(reached)
    assert total(seen[-1], "segue_http_responses_total") == count
    return seen[-1]


def reload(master: Segue) -> None:
    """Until the old generation has ended."""
    code, document = master.call("POST", f"{HOT}/reload?until=drained&wait=30")
    assert code == 200, document


def test_requests_are_counted_and_timed(application) -> None:
    with supervised("shop:app", "--workers", "2", cwd=application()) as master:
        port = master.port
        with Client(port) as one, Client(port) as other:
            for client in (one, other) * 5:
                client.get("/")
            one.get("/work?ms=60")
            found = settled(master, 11)
            assert value(found, "segue_connections") == 2
        assert value(found, "segue_http_responses_total", status="2xx", origin="application") == 11
        assert value(found, "segue_http_responses_total", status="5xx", origin="segue") == 0
        name = "segue_http_response_duration_seconds"
        assert value(found, f"{name}_count") == value(found, f"{name}_bucket", le="+Inf") == 11
        slow = value(found, f"{name}_count") - value(found, f"{name}_bucket", le="0.05")
        assert 1 <= slow <= 11
        assert value(found, f"{name}_sum") >= 0.06
        assert value(found, "segue_connections_accepted_total") == 2
        assert value(found, "segue_ready") == value(found, "segue_current_generation") == 1
        assert value(found, "segue_generation_workers", generation="1", state="active") == 2
        assert value(found, "segue_reloads_total", outcome="ok") == 1
        for worker in master.current()["workers"]:
            key = {"generation": "1", "worker": str(worker["id"])}
            assert value(found, "segue_worker_resident_memory_bytes", **key) > 1e6
            assert value(found, "segue_worker_start_time_seconds", **key) == worker["since"]
        assert value(found, "process_resident_memory_bytes") > 1e6


def test_both_formats_say_the_same_and_are_what_is_asked_for(application) -> None:
    with supervised("shop:app", cwd=application()) as master:
        with Client(master.port) as client:
            client.get("/")
        settled(master, 1)
        kind, text = raw(master)
        assert kind.startswith("text/plain; version=")
        other_kind, other = raw(master, f"{OPENMETRICS},text/plain;q=0.5")
        assert other_kind.startswith("application/openmetrics-text; version=1.0.0")
        assert other.endswith("# EOF\n")
        plain = samples(text_string_to_metric_families(text))
        strict = samples(openmetrics.text_string_to_metric_families(other))
        assert {key for key in plain if key[0].startswith("segue")} == {
            key for key in strict if key[0].startswith("segue")
        }
        key = ("segue_http_responses_total", frozenset({("status", "2xx"), ("origin", "application")}))
        assert plain[key] == strict[key] == 1
        for name in FAMILIES:
            unit = re.search("_(seconds|bytes)$", name)
            assert (f"\n# UNIT {name} " in other) == (unit is not None and f"\n# TYPE {name} " in other), name
            if unit is not None and f"# TYPE {name} " in other:
                assert f"\n# UNIT {name} {unit[1]}\n" in other
        assert "# UNIT segue_http_response_duration_seconds seconds\n" in other


def test_every_sample_is_of_a_family_that_is_declared(application) -> None:
    with supervised("shop:app", cwd=application()) as master:
        for family in text_string_to_metric_families(raw(master)[1]):
            name = re.sub("_info$", "", family.name) if family.name == "segue_info" else family.name
            assert name.startswith(("process_", "python_")) or name in FAMILIES, name
            assert family.documentation
            if name in FAMILIES:
                for sample in family.samples:
                    assert set(sample.labels) - {"le"} == set(FAMILIES[name].labels), sample


def test_a_counter_never_goes_back_on_reloads(application) -> None:
    with supervised("shop:app", "--workers", "2", cwd=application()) as master:
        with Client(master.port) as client:
            for _ in range(3):
                client.get("/")
        before = settled(master, 3)
        with Load(master.port, "--keepalive", "4") as load:
            for _ in range(2):
                reload(master)
                after = scrape(master)
                assert_monotonic(before, after)
                before = after
            load.nothing_lost()
        after = scrape(master)
        assert_monotonic(before, after)
        assert value(after, "segue_reloads_total", outcome="ok") == 3
        assert value(after, "segue_reload_duration_seconds_count", outcome="ok") == 3
        assert value(after, "segue_connections_handed_over_total") > 0
        assert value(after, "segue_current_generation") == 3


def test_what_a_worker_counted_outlives_its_end_and_crash(application) -> None:
    with supervised("shop:app", cwd=application()) as master:
        with Client(master.port) as client:
            for _ in range(5):
                client.get("/")
        before = settled(master, 5)
        reload(master)
        assert_monotonic(before, settled(master, 5))
        [pid] = master.worker_pids()
        os.kill(pid, signal.SIGKILL)
        master.wait_status(lambda status: status["ready"] and master.worker_pids() != [pid])
        after = settled(master, 5)
        assert_monotonic(before, after)
        assert value(after, "segue_worker_restarts_total", cause="crash") == 1
        left = [name for name in os.listdir(master.directory) if name.endswith(".figures")]
        assert len(left) == 1


def test_totals_outlive_an_upgrade_of_the_master(application) -> None:
    with supervised("shop:app", cwd=application()) as master:
        with Client(master.port) as client:
            client.get("/")
            client.get("/")
        settled(master, 2)
        reload(master)
        before = settled(master, 2)
        epoch = value(before, "segue_master_epoch")
        assert master.command("upgrade").returncode == 0
        master.wait_status(lambda status: status["master"]["epoch"] == epoch + 1)
        after = settled(master, 2)
        assert_monotonic(before, after)
        assert value(after, "segue_operations_total", kind="upgrade", outcome="ok") == 1


def test_totals_outlive_a_master_that_is_killed_and_a_worker_that_died_meanwhile(application) -> None:
    with supervised("shop:app", "--workers", "2", cwd=application()) as master:
        with Client(master.port) as client:
            for _ in range(4):
                client.get("/")
        reload(master)
        before = settled(master, 4)
        with Client(master.port) as client:
            for _ in range(3):
                client.get("/")
        settled(master, 7)
        pids = master.worker_pids()
        master.process.kill()
        master.process.wait()  # its output does not end: the workers have it, too
        os.kill(pids[0], signal.SIGKILL)
        runtime = {"runtime_dir": master.runtime_dir, "cwd": application()}
        with supervised("shop:app", "--workers", "2", **runtime) as successor:
            after = settled(successor, 7)
            assert_monotonic(before, after)
            assert value(after, "segue_master_epoch") == 2
            successor.stop()


def test_a_hung_worker_delays_no_scrape_and_is_seen(application) -> None:
    with supervised("shop:app", "--heartbeat-timeout", "60", cwd=application()) as master:
        [pid] = master.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        try:
            key = {"generation": "1", "worker": "1"}
            lag = "segue_worker_event_loop_lag_seconds"
            master.wait_status(lambda _: value(scrape(master), lag, **key) > 1)
        finally:
            os.kill(pid, signal.SIGCONT)


def test_refused_reloads_and_drains_are_counted(application) -> None:
    code = application()
    with supervised("shop:app", cwd=code) as master:
        application(prelude="raise RuntimeError('broken')\n")
        assert master.command("reload").returncode != 0
        application()
        assert master.command("drain", "start").returncode == 0
        found = scrape(master)
        assert value(found, "segue_reloads_total", outcome="refused") == 1
        assert value(found, "segue_operations_total", kind="drain", outcome="ok") == 1
        assert value(found, "segue_draining", mode="reject") == 1
        assert value(found, "segue_ready") == 0
        assert master.command("drain", "stop").returncode == 0


def test_what_has_not_happened_yet_is_there_with_0_so_that_an_alert_sees_the_first_time() -> None:
    with supervised("app:app", cwd=ROOT / "examples" / "quotes") as master:
        found = scrape(master)
        for outcome in ("ok", "refused"):
            assert value(found, "segue_reload_duration_seconds_count", outcome=outcome) == (outcome == "ok")
            assert value(found, "segue_operations_total", kind="upgrade", outcome=outcome) == 0
            for service in master.status()["services"]:
                assert value(found, "segue_service_swaps_total", service=service, outcome=outcome) == 0
        assert value(found, "segue_reloads_total", outcome="refused") == 0
        for ended in Outcome:
            assert value(found, "segue_probations_total", outcome=ended) == 0
        unknown = {kind for kind in KINDS if master.call("GET", f"{HOT}/{kind}")[0] == 404}
        assert unknown == {"drain", "swap"}, "those two have longer paths"


def test_a_generation_that_is_taken_back_is_counted_and_stays_so(application) -> None:
    with supervised("shop:app", "--probation", "600", cwd=application("1")) as master:
        application("2")
        assert master.command("reload").returncode == 0
        os.kill(master.worker_pids()[0], signal.SIGKILL)
        master.wait_status(lambda status: status["current"] == 1 and status["ready"])
        found = scrape(master)
        assert value(found, "segue_probations_total", outcome="rolled back") == 1
        assert value(found, "segue_reloads_total", outcome="ok") == 2
        assert master.command("upgrade").returncode == 0
        master.wait_status(lambda status: status["master"]["epoch"] == 2)
        assert_monotonic(found, scrape(master))


def test_no_label_is_one_that_prometheus_gives_to_what_it_scrapes() -> None:
    for name, family in FAMILIES.items():
        assert not {"instance", "job", "le", "quantile"} & set(family.labels), name


def test_without_request_metrics_only_the_number_of_requests_is_left(application) -> None:
    with supervised("shop:app", "--no-request-metrics", cwd=application()) as master:
        with Client(master.port) as client:
            client.get("/")
        master.wait_status(lambda _: value(scrape(master), "segue_http_requests_total") == 1)
        names = {name for name, _ in scrape(master)}
        assert not any(name.startswith("segue_http_response") for name in names)


def test_services_are_there_with_their_leases_and_metrics() -> None:
    with supervised("app:app", cwd=ROOT / "examples" / "quotes") as master:
        services = master.status()["services"]
        found = scrape(master)
        for name, service in services.items():
            assert value(found, "segue_service_leases", service=name) == service["leases"]
            assert value(found, "segue_service_version", service=name) == 1
        code, document = master.call("POST", f"{HOT}/reload/{next(iter(services))}")
        outcome = "ok" if code == 200 else "refused"
        labels = {"service": next(iter(services)), "outcome": outcome}
        assert value(scrape(master), "segue_service_swaps_total", **labels) == 1, document


def test_a_mistyped_name_of_a_service_is_no_label() -> None:
    with supervised("app:app", cwd=ROOT / "examples" / "quotes") as master:
        for name in ("price", "quote", "x" * 60):
            assert master.call("POST", f"{HOT}/reload/{name}")[0] == 404
        assert master.call("POST", f"{HOT}/reload/prices?per_euro=-1")[0] == 409
        found = scrape(master)
        labels = {dict(each).get("service") for name, each in found if name == "segue_service_swaps_total"}
        assert labels == {"prices", "quotes"}
        refused = {"kind": "swap", "outcome": "refused"}
        assert value(found, "segue_operations_total", **refused) == 4
        assert value(found, "segue_service_swaps_total", service="prices", outcome="refused") == 1


def test_messages_of_the_agent_protocol_are_counted_over_new_beginnings() -> None:
    followed = Followed()
    assert [followed.now(each) for each in (3, 5, 2, 2, 0, 4)] == [3, 5, 7, 7, 7, 11]


def test_the_built_in_applications_connector_is_there(tmp_path) -> None:
    with supervised(cwd=tmp_path, env={"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}) as master:
        found = scrape(master)
        assert value(found, "segue_hsp_messages_total", kind="received") == 0
        assert value(found, "segue_service_value", service="hsp", name="hsp_available") in {0, 1}


def test_the_admin_listener_serves_them_without_a_token(application, token_file) -> None:
    port = free_port()
    arguments = ("--admin", f"127.0.0.1:{port}", "--token-file", str(token_file))
    with supervised("shop:app", *arguments, cwd=application()):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        assert b"segue_ready 1.0" in answer.read()
        connection.close()


def test_a_master_that_nobody_scrapes_has_not_imported_the_library(application) -> None:
    with supervised("shop:app", cwd=application()) as master:
        maps = (ROOT / "/proc" / str(master.process.pid) / "maps").read_text()
        assert "prometheus" not in maps
        assert unix_call(master.control, "GET", "/livez")[0] == 200


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_only_get_and_head_are_taken(application, method) -> None:
    with supervised("shop:app", cwd=application()) as master:
        assert master.call(method, "/metrics")[0] == 405
