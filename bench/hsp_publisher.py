"""Facts at a steady rate, numbered per topic: ``python -m bench.hsp_publisher PORT RATE QOS [USER PASSWORD CA]``, until its input ends.

Prints ``ready`` once it publishes, and in the end, when the broker has acknowledged all, how many went to each topic.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

TOPICS = 8
_ENVELOPE = (
    '{"hsp_envelope_version":"0.1","message_id":"%s","correlation_id":null,"sender_ai_id":"publisher",'
    '"recipient_ai_id":"all","timestamp_sent":"2026-01-01T00:00:00Z","message_type":"HSP::Fact_v0.1",'
    '"protocol_version":"0.1","communication_pattern":"publish","qos_parameters":{},"payload_schema_uri":null,'
    '"payload":{"topic":%d,"number":%d}}'
)


def main() -> None:
    port, rate, qos = (int(argument) for argument in sys.argv[1:4])
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    client = paho.Client(CallbackAPIVersion.VERSION2, f"publisher-{uuid.uuid4().hex[:8]}")
    client.max_inflight_messages_set(20)
    client.max_queued_messages_set(0)
    if any(sys.argv[4:5]):
        client.username_pw_set(*sys.argv[4:6])
    if any(sys.argv[6:7]):
        client.tls_set(sys.argv[6])
    connected = threading.Event()
    client.on_connect = lambda *_: connected.set()
    acknowledged = threading.Semaphore(0)
    client.on_publish = lambda *_: acknowledged.release()
    client.connect("127.0.0.1", port)
    client.loop_start()
    if not connected.wait(60):
        sys.exit("the broker did not answer")
    run, sent = uuid.uuid4().hex[:8], [0] * TOPICS
    begun = time.monotonic()
    print("ready", flush=True)
    while not ended.wait(0.01):
        while sum(sent) < (time.monotonic() - begun) * rate:
            topic = sum(sent) % TOPICS
            number = sent[topic]
            data = _ENVELOPE % (f"{run}-{topic}-{number}", topic, number)
            client.publish(f"hsp/knowledge/facts/bench/{topic}", data, qos)
            sent[topic] += 1
    for _ in range(sum(sent)):  # the broker may be away meanwhile
        if not acknowledged.acquire(timeout=60):
            sys.exit("the broker has not acknowledged all")
    print(json.dumps({"sent": sent, "seconds": time.monotonic() - begun}), flush=True)
    client.disconnect()
    client.loop_stop()


if __name__ == "__main__":
    main()
