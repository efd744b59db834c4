//! One HTTP/1.1 caller: requests in turn over one kept connection.
//!
//! Small on purpose: the caller shares the machine with the server under test, so what it costs is
//! not the server's. Answers need a `Content-Length`.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bytes of an answer's head.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Bytes of an answer's body.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Which API, and with which key.
#[derive(Clone)]
pub(crate) struct Api {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// Sent as a bearer token.
    pub(crate) key: Option<String>,
}

/// An answer, whatever its status.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The status code.
    pub(crate) status: u16,
    /// The body, whole.
    pub(crate) body: Bytes,
}

impl Answer {
    /// The body as JSON, of a 2xx; otherwise an error that holds what the server said.
    pub(crate) fn json(&self) -> Result<serde_json::Value> {
        if !(200..300).contains(&self.status) {
            bail!("{}", self.complaint());
        }
        serde_json::from_slice(&self.body).context("the answer is not JSON")
    }

    /// Status and problem title (RFC 9457) on one line.
    pub(crate) fn complaint(&self) -> String {
        let problem: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
        match problem["detail"].as_str().or(problem["title"].as_str()) {
            Some(text) => format!("HTTP {}: {text}", self.status),
            None => format!("HTTP {}", self.status),
        }
    }
}

/// A caller with its connection.
pub(crate) struct Caller {
    api: Api,
    stream: Option<TcpStream>,
    buffer: BytesMut,
}

impl Caller {
    /// Connects at the first call.
    pub(crate) fn new(api: Api) -> Self {
        Self {
            api,
            stream: None,
            buffer: BytesMut::new(),
        }
    }

    /// Sends one request and reads its answer. After an error the outcome is unknown, and the next
    /// call opens a new connection.
    pub(crate) async fn call(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
        limit: Duration,
    ) -> Result<Answer> {
        let answer = tokio::time::timeout(limit, self.exchange(method, path, body))
            .await
            .unwrap_or_else(|_| Err(anyhow!("no answer within {limit:?}")));
        if answer.is_err() {
            self.stream = None;
        }
        answer
    }

    async fn exchange(&mut self, method: &str, path: &str, body: Option<&[u8]>) -> Result<Answer> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.api.address)
                    .await
                    .with_context(|| format!("connect to {}", self.api.address))?;
                stream.set_nodelay(true).context("cannot set TCP_NODELAY")?;
                stream
            }
        };
        self.buffer.clear();
        write_request(&mut self.buffer, &self.api, method, path, body);
        stream
            .write_all(&self.buffer)
            .await
            .context("connection lost")?;
        self.buffer.clear();
        let head = loop {
            if let Some(end) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                let head = parse_head(&self.buffer[..end])?;
                self.buffer.advance(end + 4);
                break head;
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                bail!("the answer's head is longer than {HEAD_BYTES_MAX} bytes");
            }
            fill(&mut stream, &mut self.buffer).await?;
        };
        while self.buffer.len() < head.length {
            fill(&mut stream, &mut self.buffer).await?;
        }
        let body = self.buffer.split_to(head.length).freeze();
        if !head.close {
            self.stream = Some(stream);
        }
        Ok(Answer {
            status: head.status,
            body,
        })
    }
}

async fn fill(stream: &mut TcpStream, buffer: &mut BytesMut) -> Result<()> {
    buffer.reserve(4 * 1024);
    match stream.read_buf(buffer).await.context("connection lost")? {
        0 => bail!("the server closed the connection before it had answered"),
        _ => Ok(()),
    }
}

fn write_request(out: &mut BytesMut, api: &Api, method: &str, path: &str, body: Option<&[u8]>) {
    let put = |out: &mut BytesMut, text: &str| out.extend_from_slice(text.as_bytes());
    put(
        out,
        &format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", api.address),
    );
    if let Some(key) = &api.key {
        put(out, &format!("Authorization: Bearer {key}\r\n"));
    }
    if let Some(body) = body {
        put(
            out,
            &format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                body.len()
            ),
        );
        out.extend_from_slice(body);
    } else {
        put(out, "\r\n");
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    length: usize,
    close: bool,
}

fn parse_head(head: &[u8]) -> Result<Head> {
    let text = std::str::from_utf8(head).context("the answer's head is not text")?;
    let mut lines = text.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok())
        .context("the answer is not HTTP/1.1")?;
    let (mut length, mut close) = (None, false);
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(
                value
                    .parse()
                    .context("the answer's Content-Length is not a number")?,
            );
        } else if name.eq_ignore_ascii_case("connection") {
            close = value.eq_ignore_ascii_case("close");
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            bail!("the answer comes in chunks, which this caller does not read");
        }
    }
    let length = if status == 204 {
        0
    } else {
        length.context("the answer has no Content-Length")?
    };
    if length > BODY_BYTES_MAX {
        bail!("the answer's body of {length} bytes is longer than {BODY_BYTES_MAX}");
    }
    Ok(Head {
        status,
        length,
        close,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_whatever_their_case() {
        let head = parse_head(b"HTTP/1.1 202 Accepted\r\ncontent-length: 17\r\nConnection: Close")
            .unwrap();
        assert_eq!(
            head,
            Head {
                status: 202,
                length: 17,
                close: true
            }
        );
        let head = parse_head(b"HTTP/1.1 204 No Content\r\nx: y").unwrap();
        assert_eq!(
            head,
            Head {
                status: 204,
                length: 0,
                close: false
            }
        );
    }

    #[test]
    fn heads_that_cannot_be_followed_are_refused() {
        for (head, expected) in [
            (&b"SSH-2.0-x"[..], "not HTTP/1.1"),
            (b"HTTP/1.1 200 OK\r\nx: y", "no Content-Length"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: many", "not a number"),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked", "chunks"),
            (
                b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999",
                "longer than",
            ),
        ] {
            let error = format!("{:#}", parse_head(head).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_request_carries_key_and_body() {
        let api = Api {
            address: ([127, 0, 0, 1], 80).into(),
            key: Some("k".to_owned()),
        };
        let mut out = BytesMut::new();
        write_request(&mut out, &api, "POST", "/v1/push", Some(b"{}"));
        assert_eq!(
            out,
            "POST /v1/push HTTP/1.1\r\nHost: 127.0.0.1:80\r\nAuthorization: Bearer k\r\n\
             Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        );
    }

    #[test]
    fn a_problem_is_quoted() {
        let body = Bytes::from_static(br#"{"title":"Unauthorized","detail":"no key was sent"}"#);
        assert_eq!(
            Answer { status: 401, body }.complaint(),
            "HTTP 401: no key was sent"
        );
        assert_eq!(
            Answer {
                status: 500,
                body: Bytes::new()
            }
            .complaint(),
            "HTTP 500"
        );
    }
}
