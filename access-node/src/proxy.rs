//! The PROXY protocol, versions 1 and 2: the address of a client behind a proxy, as the proxy tells
//! it before the first byte of the client.
//!
//! Only a listed proxy is believed, and only what belongs to the header is taken from the socket,
//! so that TLS or MQTT begins where it ends. The layout of both versions is `ppp`'s.

use std::io;
use std::net::SocketAddr;

use ppp::{v1, v2};
use tokio::net::TcpStream;

/// Bytes of a version 1 header at most, as the protocol says.
const V1_BYTES_MAX: usize = 107;
/// Bytes of a version 2 header at most: addresses and some kilobytes of what proxies add to them.
const V2_BYTES_MAX: usize = 4096;
/// What a version 2 header begins with, before its length.
const V2_PREFIX: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
const V2_FIXED_BYTES: usize = 16;
const V1_PREFIX: &[u8; 6] = b"PROXY ";

/// Why a connection through a listener with PROXY headers is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    #[error("the peer is not in proxy_protocol_from")]
    Untrusted,
    #[error("no PROXY header comes first")]
    Missing,
    #[error("the PROXY header is not valid: {0}")]
    Invalid(String),
    #[error("the PROXY header is longer than {0} bytes")]
    TooLong(usize),
    #[error(transparent)]
    Network(#[from] io::Error),
}

/// Reads the header. `None` where it names no client: the proxy speaks for itself, or knows of no
/// address.
pub(crate) async fn read_header(stream: &TcpStream) -> Result<Option<SocketAddr>, ProxyError> {
    let mut header = Vec::with_capacity(V1_BYTES_MAX);
    // Each version has at least as many bytes as the other's prefix.
    read_to(stream, &mut header, V2_PREFIX.len(), is_beginning).await?;
    if header == V2_PREFIX {
        read_to(stream, &mut header, V2_FIXED_BYTES, |_| true).await?;
        let length = V2_FIXED_BYTES + usize::from(u16::from_be_bytes([header[14], header[15]]));
        if length > V2_BYTES_MAX {
            return Err(ProxyError::TooLong(V2_BYTES_MAX));
        }
        read_to(stream, &mut header, length, |_| true).await?;
        return client_v2(&header);
    }
    read_line(stream, &mut header).await?;
    client_v1(&header)
}

fn is_beginning(header: &[u8]) -> bool {
    let agrees = |prefix: &[u8]| header.iter().zip(prefix).all(|(a, b)| a == b);
    agrees(V2_PREFIX) || agrees(V1_PREFIX)
}

/// Reads until `header` has `length` bytes, as long as it stays `plausible`.
async fn read_to(
    stream: &TcpStream,
    header: &mut Vec<u8>,
    length: usize,
    plausible: impl Fn(&[u8]) -> bool,
) -> Result<(), ProxyError> {
    while header.len() < length {
        let mut part = [0; 256];
        let wanted = part.len().min(length - header.len());
        stream.readable().await?;
        match stream.try_read(&mut part[..wanted]) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(read) => header.extend_from_slice(&part[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if !plausible(header) {
            return Err(ProxyError::Missing);
        }
    }
    Ok(())
}

/// Reads to the end of a line and not beyond it.
async fn read_line(stream: &TcpStream, header: &mut Vec<u8>) -> Result<(), ProxyError> {
    while header.last() != Some(&b'\n') {
        if header.len() >= V1_BYTES_MAX {
            return Err(ProxyError::TooLong(V1_BYTES_MAX));
        }
        let mut part = [0; V1_BYTES_MAX];
        let wanted = V1_BYTES_MAX - header.len();
        let seen = stream.peek(&mut part[..wanted]).await?;
        let end = part[..seen].iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(seen, |at| at + 1);
        if taken == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let length = header.len() + taken;
        read_to(stream, header, length, |_| true).await?;
    }
    Ok(())
}

fn client_v1(header: &[u8]) -> Result<Option<SocketAddr>, ProxyError> {
    if !header.ends_with(b"\r\n") {
        // After UNKNOWN the parser takes any line.
        let problem = "the line does not end in CR LF";
        return Err(ProxyError::Invalid(problem.to_owned()));
    }
    let header =
        v1::Header::try_from(header).map_err(|error| ProxyError::Invalid(error.to_string()))?;
    Ok(match header.addresses {
        v1::Addresses::Unknown => None,
        v1::Addresses::Tcp4(ip) => Some((ip.source_address, ip.source_port).into()),
        v1::Addresses::Tcp6(ip) => Some((ip.source_address, ip.source_port).into()),
    })
}

fn client_v2(header: &[u8]) -> Result<Option<SocketAddr>, ProxyError> {
    let header =
        v2::Header::try_from(header).map_err(|error| ProxyError::Invalid(error.to_string()))?;
    if header.command == v2::Command::Local {
        return Ok(None);
    }
    Ok(match header.addresses {
        v2::Addresses::IPv4(ip) => Some((ip.source_address, ip.source_port).into()),
        v2::Addresses::IPv6(ip) => Some((ip.source_address, ip.source_port).into()),
        // The proxy's own clients come over another kind of socket.
        v2::Addresses::Unspecified | v2::Addresses::Unix(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    /// What comes of `bytes`, cut into `segment`s, and what is left on the socket behind them.
    fn read(bytes: &[u8], segment: usize) -> (Result<Option<SocketAddr>, String>, Vec<u8>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut proxy = TcpStream::connect(listener.local_addr().unwrap())
                .await
                .unwrap();
            let (server, _) = listener.accept().await.unwrap();
            let sending = async move {
                for part in bytes.chunks(segment) {
                    // The reader may have refused it already.
                    let _ = proxy.write_all(part).await;
                    tokio::task::yield_now().await;
                }
                drop(proxy);
            };
            let (read, ()) = tokio::join!(read_header(&server), sending);
            let mut rest = vec![0; 64];
            let _ = server.readable().await;
            let length = server.try_read(&mut rest).unwrap_or(0);
            rest.truncate(length);
            (read.map_err(|error| error.to_string()), rest)
        })
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let mut header = V2_PREFIX.to_vec();
        header.extend([0x20 | command, family]);
        header.extend((body.len() as u16).to_be_bytes());
        header.extend(body);
        header
    }

    const ADDRESSES: [u8; 12] = [203, 0, 113, 7, 10, 0, 0, 1, 0x9C, 0x41, 0x07, 0x5B];

    #[test]
    fn a_header_names_the_client_and_nothing_behind_it_is_taken() {
        let client = Some("203.0.113.7:40001".parse().unwrap());
        let mut six = [0; 36];
        six[15] = 1;
        six[33] = 80;
        let with_extras = [&ADDRESSES[..], &[0x03, 0, 4, 1, 2, 3, 4], &[0x20; 200]].concat();
        let cases: Vec<(Vec<u8>, Option<SocketAddr>)> = vec![
            (
                b"PROXY TCP4 203.0.113.7 10.0.0.1 40001 1883\r\n".to_vec(),
                client,
            ),
            (
                b"PROXY TCP6 ::1 ::2 40001 1883\r\n".to_vec(),
                "[::1]:40001".parse().ok(),
            ),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN what ever\r\n".to_vec(), None),
            (v2(1, 0x11, &ADDRESSES), client),
            (v2(1, 0x11, &with_extras), client),
            (v2(1, 0x21, &six), "[::1]:80".parse().ok()),
            (v2(0, 0x11, &ADDRESSES), None),
            (v2(0, 0, &[]), None),
            (v2(1, 0, &[]), None),
            (v2(1, 0x31, &[0; 216]), None),
        ];
        for (header, expected) in cases {
            let wire = [&header[..], b"\x10\x0dMQTT"].concat();
            for segment in [1, 7, 1000] {
                let (read, rest) = read(&wire, segment);
                assert_eq!(read, Ok(expected), "{header:?} by {segment}");
                assert!(b"\x10\x0dMQTT".starts_with(&rest), "{header:?}: {rest:?}");
                assert!(!rest.is_empty(), "{header:?}");
            }
        }
    }

    #[test]
    fn what_is_no_header_is_refused_and_told_why() {
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (b"\x10\x0d\0\x04MQTT".to_vec(), "no PROXY header"),
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "no PROXY header"),
            (b"PROXY TCP4 1.2.3.4\r\n".to_vec(), "not valid"),
            (
                b"PROXY TCP4 1.2.3.4 5.6.7.8 1 99999\r\n".to_vec(),
                "not valid",
            ),
            (b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n".to_vec(), "not valid"),
            (
                [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200]].concat(),
                "longer than 107",
            ),
            (v2(2, 0x11, &ADDRESSES), "not valid"),
            (v2(1, 0x11, &ADDRESSES[..5]), "not valid"),
            (v2(1, 0x11, &[0; 5000]), "longer than 4096"),
            (v2(1, 0x11, &ADDRESSES)[..20].to_vec(), "unexpected end"),
            (b"PROXY TCP4 1.2.3.4".to_vec(), "unexpected end"),
        ];
        for (bytes, expected) in cases {
            let (read, _) = read(&bytes, 1000);
            let error = read.unwrap_err();
            assert!(error.contains(expected), "{bytes:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = client_v1(&bytes);
            let _ = client_v2(&bytes);
            let after_prefix = [&V2_PREFIX[..], &bytes].concat();
            let _ = client_v2(&after_prefix);
        }
    }
}
