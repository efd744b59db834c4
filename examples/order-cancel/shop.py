#!/usr/bin/env python3
"""A small shop whose orders are cancelled unless they are paid in time. Standard library only.

    POST /orders                {"seat": "14C", "phone": "ann-phone"}   an order: holds the seat
    POST /orders/{id}/pay                                               pays it
    GET  /orders/{id}                                                   its state: open, paid or cancelled
    GET  /seats                                                         which seats are held, and by which order

The shop keeps no timer. With each order it leaves a job with Moorline, to be done in PAY_WITHIN unless the event
`order.paid:{id}` is told before: call this shop back at /orders/{id}/expire, then push to the phone. What the shop does not
answer with 2xx is tried again, and the push waits for the phone, so that both happen, whoever is restarted in between.

Environment: MOORLINE_URL, MOORLINE_API_KEY, PAY_WITHIN (15m), SHOP_PORT (0 takes a free one), SHOP_URL (where Moorline reaches
this shop), WEBHOOK_SECRET (whsec_…, as in `delays.webhook_secret`; without it calls are not verified).
"""

import base64
import hashlib
import hmac
import json
import os
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MOORLINE = os.environ.get("MOORLINE_URL", "http://127.0.0.1:8080")
KEY = os.environ["MOORLINE_API_KEY"]
PAY_WITHIN = os.environ.get("PAY_WITHIN", "15m")
SECRET = os.environ.get("WEBHOOK_SECRET", "")

lock = threading.Lock()
orders = {}  # id -> {"state", "seat", "phone"}
seats = {}  # seat -> order id


def moorline(path, body):
    """One call of Moorline's HTTP API."""
    request = urllib.request.Request(
        MOORLINE + path,
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def is_genuine(headers, body):
    """Whether a call comes from our Moorline: https://www.standardwebhooks.com."""
    if not SECRET:
        return True
    sent_at = headers.get("webhook-timestamp", "")
    if not sent_at.isdigit() or abs(time.time() - int(sent_at)) > 300:
        return False
    signed = f"{headers.get('webhook-id')}.{sent_at}.".encode() + body
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return any(hmac.compare_digest(expected, given) for given in headers.get("webhook-signature", "").split())


def make_order(body, shop_url):
    with lock:
        if body["seat"] in seats:
            return 409, {"error": "this seat is taken"}
        order = f"{len(orders) + 1}"
        orders[order] = {"state": "open", "seat": body["seat"], "phone": body["phone"]}
        seats[body["seat"]] = order
    try:
        moorline(
            "/v1/delays",
            {
                "id": f"order-{order}",
                "delay": PAY_WITHIN,
                "cancel_on": [f"order.paid:{order}"],
                "action": [
                    {"webhook": {"url": f"{shop_url}/orders/{order}/expire"}},
                    {"push": {"to": {"client": body["phone"]}, "payload": {"order": order, "state": "cancelled"}}},
                ],
            },
        )
    except (urllib.error.URLError, OSError) as error:
        release(order)
        return 503, {"error": f"try again: {error}"}
    return 201, {"order": order, **orders[order]}


def release(order):
    with lock:
        found = orders[order]
        if found["state"] == "open":
            found["state"] = "cancelled"
            del seats[found["seat"]]
        return found["state"]


def pay(order):
    with lock:
        found = orders[order]
        if found["state"] == "cancelled":
            return 410, {"order": order, **found}
        found["state"] = "paid"
    # However often this is told, it counts once. If it cannot be told now, the order is paid all the same: `expire` sees that.
    try:
        moorline("/v1/events", {"type": "order.paid", "key": order, "id": f"paid-{order}"})
    except (urllib.error.URLError, OSError) as error:
        print(f"payment of {order} not told: {error}", flush=True)
    return 200, {"order": order, **found}


def expire(order):
    """Called by Moorline when nobody has paid in time; maybe twice, and then the second changes nothing."""
    if release(order) == "paid":
        # It was paid at the last moment. A refusal ends the job, so that no push says otherwise.
        return 409, {"error": "it is paid"}
    return 200, {"order": order, **orders[order]}


class Shop(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        parts = self.path.strip("/").split("/")
        if parts == ["seats"]:
            return self.answer(200, dict(seats))
        if parts[0] == "orders" and len(parts) == 2 and parts[1] in orders:
            return self.answer(200, {"order": parts[1], **orders[parts[1]]})
        return self.answer(404, {"error": "no such thing"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = self.path.strip("/").split("/")
        if parts == ["orders"]:
            return self.answer(*make_order(json.loads(body), shop_url(self.server)))
        if len(parts) == 3 and parts[0] == "orders" and parts[1] in orders:
            if parts[2] == "pay":
                return self.answer(*pay(parts[1]))
            if parts[2] == "expire":
                if not is_genuine(self.headers, body):
                    return self.answer(401, {"error": "who are you?"})
                return self.answer(*expire(parts[1]))
        return self.answer(404, {"error": "no such thing"})

    def answer(self, status, body):
        text = (json.dumps(body) + "\n").encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, form, *values):
        print(form % values, flush=True)


def shop_url(server):
    return os.environ.get("SHOP_URL", f"http://127.0.0.1:{server.server_port}")


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("SHOP_PORT", "0"))), Shop)
    print(f"listening {shop_url(server)}", flush=True)
    server.serve_forever()
