//! What the node does with bytes before they are MQTT, for those who try any: the fuzz targets, and a test
//! that damages their corpus. Nothing else uses it.

use std::io::Write as _;
use std::net::{Shutdown, TcpListener};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use moorline_mqtt::Decoder;
use socket2::SockRef;

use crate::proxy;
use crate::ws::{self, Deframer};

const PACKET_BYTES_MAX: u32 = 65_536;

/// WebSocket frames in front of the decoder: in whatever pieces they come, the same comes out.
///
/// # Panics
/// When it does not.
pub fn websocket(data: &[u8]) {
    let Some((pieces, stream)) = data.split_first() else {
        return;
    };
    upgrade(*pieces, stream);
    let (whole, whole_out) = deframe(stream, usize::MAX);
    let (torn, torn_out) = deframe(stream, 1 + usize::from(*pieces));
    assert_eq!(whole, torn);
    assert_eq!(whole_out, torn_out);
    assert!(
        whole_out.len() <= stream.len(),
        "frames add bytes, they take none away"
    );
    let mut decoder = Decoder::server(PACKET_BYTES_MAX);
    let mut mqtt = whole_out.freeze();
    while let Ok(Some(_)) = decoder.decode(&mut mqtt) {}
}

/// Frames to send back and whether the peer closes, or why the stream is refused.
type Deframed = Result<(BytesMut, bool), String>;

fn deframe(stream: &[u8], step: usize) -> (Deframed, BytesMut) {
    let mut deframer = Deframer::default();
    let (mut out, mut frames, mut closed) = (BytesMut::new(), BytesMut::new(), false);
    for piece in stream.chunks(step) {
        match deframer.feed(piece, &mut out) {
            Ok(answer) => {
                frames.extend_from_slice(&answer.frames);
                closed = answer.closed;
            }
            Err(error) => return (Err(error.to_string()), out),
        }
        if closed {
            break;
        }
    }
    (Ok((frames, closed)), out)
}

/// A whole request is not refused while it is torn, and its end is found.
fn upgrade(torn_at: u8, request: &[u8]) {
    if let Ok(Some((used, response))) = ws::upgrade(request) {
        assert!(used <= request.len() && !response.is_empty());
        let torn = &request[..used.saturating_sub(1).min(torn_at.into())];
        assert_eq!(ws::upgrade(torn).map(|found| found.is_some()), Ok(false));
    }
}

/// A PROXY header on a real socket: it is read or refused, and what stands behind it is left there.
///
/// # Panics
/// When it is not, or the system gives no sockets.
pub fn proxy_header(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the system gives an event loop");
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").expect("the system gives a socket");
        let address = listener.local_addr().expect("a bound socket has one");
        let mut peer = std::net::TcpStream::connect(address).expect("somebody listens");
        let (stream, _) = listener.accept().expect("somebody connected");
        // Thousands of sockets in a second would use up all ports while they are remembered.
        SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .expect("a socket can be told");
        stream.set_nonblocking(true).expect("a socket can be told");
        peer.write_all(data).expect("a few bytes fit");
        peer.shutdown(Shutdown::Write).expect("the socket is open");
        let stream = tokio::net::TcpStream::from_std(stream).expect("it does not block");
        let read = proxy::read_header(&stream).await;
        let mut rest = BytesMut::with_capacity(data.len() + 1);
        loop {
            stream.readable().await.expect("the socket is open");
            match stream.try_read_buf(&mut rest) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let rest = rest.freeze();
        assert!(
            data.ends_with(&rest),
            "what is left is the end of what came"
        );
        match read {
            Ok(_) => {
                let header = Bytes::copy_from_slice(&data[..data.len() - rest.len()]);
                let is_v1 = header.starts_with(b"PROXY ") && header.ends_with(b"\r\n");
                assert!(
                    is_v1 || header.starts_with(b"\r\n\r\n\0\r\nQUIT\n"),
                    "{header:?}"
                );
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::time::Instant;

    /// Of each door.
    const PATIENCE: Duration = Duration::from_secs(2);

    fn corpus(name: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../fuzz/corpus")
            .join(name);
        let mut files: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert!(files.len() >= 5, "a corpus of {name}");
        files
            .iter()
            .map(|file| std::fs::read(file).unwrap())
            .collect()
    }

    /// As it stands, and with bytes of it changed, left out, doubled and joined.
    fn damage(name: &str, check: fn(&[u8])) {
        let corpus = corpus(name);
        corpus.iter().for_each(|data| check(data));
        let mut state = 0x9E37_79B9_u64;
        let mut below = |end: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            usize::try_from(state >> 33).unwrap() % end.max(1)
        };
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            let mut data = corpus[below(corpus.len())].clone();
            for _ in 0..=below(4) {
                let at = below(data.len());
                match below(5) {
                    0 if !data.is_empty() => data[at] = u8::try_from(below(256)).unwrap(),
                    1 if !data.is_empty() => data[at] ^= 1 << below(8),
                    2 => data.truncate(at),
                    3 => data.extend_from_within(at..),
                    _ => data.extend_from_slice(&corpus[below(corpus.len())]),
                }
            }
            data.truncate(8 * 1024);
            check(&data);
        }
    }

    #[test]
    fn damaged_websocket_streams_are_refused_or_mean_the_same_in_any_pieces() {
        damage("websocket", websocket);
    }

    #[test]
    fn damaged_proxy_headers_are_refused_or_end_where_they_say() {
        damage("proxy_header", proxy_header);
    }
}
