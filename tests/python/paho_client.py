"""A device on paho-mqtt against a running gateway: every QoS, retained, will, session, push.

usage: paho_client.py tcp|websockets 3.1.1|5.0 PORT HTTP_URL
"""

import json
import os
import queue
import sys
import urllib.request

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

TRANSPORT, VERSION, PORT, HTTP = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
V5 = VERSION == "5.0"
PATIENCE_S = 20
PREFIX = f"{TRANSPORT}/{VERSION}"


class Device:
    """One client whose callbacks fill queues."""

    def __init__(self, client_id, clean=True, will=None):
        arguments = {} if V5 else {"clean_session": clean}
        self.client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=client_id,
            transport=TRANSPORT,
            protocol=mqtt.MQTTv5 if V5 else mqtt.MQTTv311,
            **arguments,
        )
        if TRANSPORT == "websockets":
            self.client.ws_set_options(path="/mqtt")
        if will:
            self.client.will_set(*will)
        self.connected, self.messages = queue.Queue(), queue.Queue()
        self.done, self.closed = queue.Queue(), queue.Queue()
        self.client.on_connect = lambda c, u, flags, reason, p: self.connected.put((flags, reason))
        self.client.on_message = lambda c, u, message: self.messages.put(message)
        self.client.on_subscribe = lambda c, u, mid, reasons, p: self.done.put(reasons)
        self.client.on_disconnect = lambda c, u, flags, reason, p: self.closed.put(reason)
        options = {}
        if V5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = 0 if clean else 600
            options = {"clean_start": clean, "properties": properties}
        self.client.connect("127.0.0.1", PORT, keepalive=30, **options)
        self.client.loop_start()
        self.flags, reason = self.connected.get(timeout=PATIENCE_S)
        assert not reason.is_failure, reason

    def subscribe(self, topic, qos):
        self.client.subscribe(topic, qos)
        reasons = self.done.get(timeout=PATIENCE_S)
        assert [reason.value for reason in reasons] == [qos], reasons

    def publish(self, topic, payload, qos, retain=False):
        info = self.client.publish(topic, payload, qos, retain)
        info.wait_for_publish(PATIENCE_S)
        assert info.is_published(), (topic, qos)

    def take(self):
        return self.messages.get(timeout=PATIENCE_S)

    def close(self):
        self.client.disconnect()
        self.closed.get(timeout=PATIENCE_S)
        self.client.loop_stop()

    def break_off(self):
        """Ends the connection without a DISCONNECT."""
        self.client.loop_stop()
        self.client.socket().close()


def call(method, path, body=None):
    request = urllib.request.Request(
        HTTP + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": "Bearer " + os.environ["MOORLINE_API_KEY"],
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        text = answer.read()
        return answer.status, json.loads(text) if text else None


def every_qos_arrives():
    subscriber, publisher = Device("sub"), Device("pub")
    subscriber.subscribe(f"{PREFIX}/qos/#", 2)
    for qos in (0, 1, 2):
        publisher.publish(f"{PREFIX}/qos/{qos}", f"text {qos}", qos)
        message = subscriber.take()
        assert (message.payload.decode(), message.qos) == (f"text {qos}", qos), message.payload
    big = os.urandom(300_000)
    publisher.publish(f"{PREFIX}/qos/big", big, 1)
    assert subscriber.take().payload == big
    subscriber.close()
    publisher.close()


def retained_is_kept():
    publisher = Device("pub")
    publisher.publish(f"{PREFIX}/kept", "kept", 1, retain=True)
    late = Device("late")
    late.subscribe(f"{PREFIX}/kept", 1)
    message = late.take()
    assert message.retain and message.payload == b"kept"
    publisher.publish(f"{PREFIX}/kept", "", 1, retain=True)
    late.close()
    publisher.close()


def a_will_is_published():
    watcher = Device("watcher")
    watcher.subscribe(f"{PREFIX}/will", 1)
    Device("doomed", will=(f"{PREFIX}/will", "gone", 1, False)).break_off()
    assert watcher.take().payload == b"gone"
    watcher.close()


def a_session_is_resumed():
    device = Device("keeper", clean=False)
    device.subscribe(f"{PREFIX}/missed", 1)
    device.close()
    publisher = Device("pub")
    for number in range(20):
        publisher.publish(f"{PREFIX}/missed", str(number), 1)
    publisher.close()
    device = Device("keeper", clean=False)
    assert device.flags.session_present
    assert [device.take().payload.decode() for _ in range(20)] == [str(n) for n in range(20)]
    device.close()
    Device("keeper", clean=True).close()


def a_push_arrives():
    device = Device("phone")
    status, answer = call(
        "POST", "/v1/push", {"to": {"client": "phone"}, "payload": {"order": 1}, "qos": 2}
    )
    assert status == 202, answer
    message = device.take()
    assert (message.topic, message.payload, message.qos) == ("d/phone/push", b'{"order":1}', 2)
    if V5:
        assert ("message-id", answer["id"]) in message.properties.UserProperty
    device.close()


def upstream_is_taken():
    device = Device("car")
    for qos in (0, 1, 2):
        device.publish(f"up/{PREFIX}", f"to the backend {qos}", qos)
    # Whoever runs this reads them.
    device.close()


for check in (
    every_qos_arrives,
    retained_is_kept,
    a_will_is_published,
    a_session_is_resumed,
    a_push_arrives,
    upstream_is_taken,
):
    check()
    print(check.__name__.replace("_", " "))
print("all passed")
