//! WebSocket around any byte stream, as a client: the upgrade and masked binary frames.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};

const UPGRADE: &str = "GET /mqtt HTTP/1.1\r\nHost: gateway\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n";
const MASK: [u8; 4] = [0x5A, 1, 0xFE, 0x33];

/// Upgrades `stream` and gives what is inside of the frames.
///
/// # Panics
/// When the server does not switch protocols.
pub async fn over<S>(mut stream: S) -> DuplexStream
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    stream
        .write_all(UPGRADE.as_bytes())
        .await
        .expect("the connection is open");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = stream.read_u8().await.expect("an answer to the upgrade");
        head.push(byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (read, write) = tokio::io::split(stream);
    let (from_test, to_test) = tokio::io::split(far);
    tokio::spawn(wrap(from_test, write));
    tokio::spawn(async move {
        let mut to_test = to_test;
        unwrap(read, &mut to_test).await;
        _ = to_test.shutdown().await;
    });
    near
}

async fn wrap(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut part = vec![0; 16 * 1024];
    loop {
        let length = from.read(&mut part).await.unwrap_or(0);
        if length == 0 {
            _ = to.shutdown().await;
            return;
        }
        let mut frame = vec![0x82];
        match length {
            0..=125 => frame.push(0x80 | length as u8),
            _ => {
                frame.push(0x80 | 126);
                frame.extend((length as u16).to_be_bytes());
            }
        }
        frame.extend(MASK);
        frame.extend(
            part[..length]
                .iter()
                .zip(MASK.iter().cycle())
                .map(|(byte, mask)| byte ^ mask),
        );
        if to.write_all(&frame).await.is_err() {
            return;
        }
    }
}

async fn unwrap(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    while let Ok(first) = from.read_u8().await {
        let Ok(length) = from.read_u8().await else {
            return;
        };
        assert_eq!(length & 0x80, 0, "a server masks nothing");
        let length = match length {
            126 => u64::from(from.read_u16().await.unwrap_or(0)),
            127 => from.read_u64().await.unwrap_or(0),
            short => u64::from(short),
        };
        let mut payload = vec![0; usize::try_from(length).expect("fits into memory")];
        if from.read_exact(&mut payload).await.is_err() || first & 0x0F == 0x8 {
            return;
        }
        if to.write_all(&payload).await.is_err() {
            return;
        }
    }
}
