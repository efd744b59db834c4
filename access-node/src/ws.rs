//! WebSocket around the byte stream: the upgrade and the frames (RFC 6455, MQTT 5.0 section 6).
//!
//! MQTT takes the payload of binary frames as one stream ([MQTT-6.0.0-2]), so frames are unwrapped
//! and forgotten as they come: nothing is buffered but a torn header. The upgrade's HTTP and the
//! layout of frame headers are `tungstenite`'s.

use std::io::{Cursor, Write as _};

use bytes::{Buf, BufMut, BytesMut};
use tungstenite::handshake::machine::TryParse;
use tungstenite::handshake::server::{Request, create_response, write_response};
use tungstenite::http::HeaderValue;
use tungstenite::http::header::SEC_WEBSOCKET_PROTOCOL;
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Control, Data, OpCode};

/// Bytes of an upgrade request at most.
pub(crate) const REQUEST_BYTES_MAX: usize = 8 * 1024;

/// Why a peer's bytes are not MQTT over WebSocket.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum WsError {
    #[error("the upgrade request is not valid: {0}")]
    Upgrade(String),
    #[error("the upgrade request must offer the subprotocol \"mqtt\"")]
    Subprotocol,
    #[error("a frame is not masked")]
    Unmasked,
    #[error("a frame sets reserved bits or a reserved opcode")]
    Reserved,
    #[error("a text frame; MQTT is sent in binary frames")]
    Text,
    #[error("a continuation without a beginning, or a beginning before an end")]
    Fragments,
    #[error("a control frame is fragmented or longer than 125 bytes")]
    Control,
}

/// The answer to an upgrade request, once all of it is there: `(bytes used, response)`.
pub(crate) fn upgrade(request: &[u8]) -> Result<Option<(usize, Vec<u8>)>, WsError> {
    let invalid = |error: tungstenite::Error| WsError::Upgrade(error.to_string());
    let Some((used, request)) = Request::try_parse(request).map_err(invalid)? else {
        return if request.len() > REQUEST_BYTES_MAX {
            Err(WsError::Upgrade(format!(
                "longer than {REQUEST_BYTES_MAX} bytes"
            )))
        } else {
            Ok(None)
        };
    };
    let mut response = create_response(&request).map_err(invalid)?;
    let offered = request.headers().get_all(SEC_WEBSOCKET_PROTOCOL);
    let mqtt = offered
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|name| name.trim() == "mqtt");
    if !mqtt {
        return Err(WsError::Subprotocol);
    }
    response
        .headers_mut()
        .insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("mqtt"));
    let mut bytes = Vec::with_capacity(256);
    write_response(&mut bytes, &response).map_err(invalid)?;
    Ok(Some((used, bytes)))
}

/// What is said to a peer whose upgrade is refused.
pub(crate) fn refusal(error: &WsError) -> Vec<u8> {
    let body = format!("{error}\n");
    let mut bytes = Vec::with_capacity(128 + body.len());
    write!(
        bytes,
        "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .expect("writing to memory");
    bytes
}

/// Begins a binary frame of `length` bytes; they follow.
pub(crate) fn begin_frame(length: usize, out: &mut BytesMut) {
    put_header(OpCode::Data(Data::Binary), length, out);
}

/// A close frame with status 1000.
pub(crate) fn close_frame(out: &mut BytesMut) {
    put_header(OpCode::Control(Control::Close), 2, out);
    out.put_u16(1000);
}

/// The answer to a ping.
fn pong_frame(payload: &[u8], out: &mut BytesMut) {
    put_header(OpCode::Control(Control::Pong), payload.len(), out);
    out.put_slice(payload);
}

fn put_header(opcode: OpCode, length: usize, out: &mut BytesMut) {
    let header = FrameHeader {
        is_final: true,
        rsv1: false,
        rsv2: false,
        rsv3: false,
        opcode,
        mask: None,
    };
    header
        .format(length as u64, &mut out.writer())
        .expect("writing to memory");
}

/// Where in a frame the stream stands.
#[derive(Debug, Default)]
pub(crate) struct Deframer {
    /// The beginning of a header whose end has not come yet.
    torn_header: Vec<u8>,
    /// Bytes of the current frame that are still to come.
    remaining: u64,
    mask: [u8; 4],
    /// How far the mask has turned.
    mask_offset: usize,
    /// The control frame that is being read, or `None` within data.
    control: Option<(Control, Vec<u8>)>,
    /// A binary message has begun and not ended.
    in_message: bool,
}

/// What a run through the [`Deframer`] calls for besides the data.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Frames to send back.
    pub(crate) frames: BytesMut,
    /// The peer closes.
    pub(crate) closed: bool,
}

impl Deframer {
    /// Takes bytes from the network and appends the MQTT stream to `out`.
    pub(crate) fn feed(&mut self, mut input: &[u8], out: &mut BytesMut) -> Result<Answer, WsError> {
        let mut answer = Answer::default();
        while !input.is_empty() && !answer.closed {
            if self.remaining == 0 && self.control.is_none() && !self.read_header(&mut input)? {
                break;
            }
            self.read_payload(&mut input, out);
            if self.remaining == 0
                && let Some((control, payload)) = self.control.take()
            {
                match control {
                    Control::Ping => pong_frame(&payload, &mut answer.frames),
                    Control::Close => answer.closed = true,
                    Control::Pong | Control::Reserved(_) => {}
                }
            }
        }
        Ok(answer)
    }

    /// Says whether a whole header was there.
    fn read_header(&mut self, input: &mut &[u8]) -> Result<bool, WsError> {
        let torn = self.torn_header.len();
        // A header has at most 14 bytes; what is taken of the payload here is only looked at.
        let taken = input.len().min(14);
        self.torn_header.extend_from_slice(&input[..taken]);
        let mut cursor = Cursor::new(&self.torn_header[..]);
        let Some((header, length)) =
            FrameHeader::parse(&mut cursor).map_err(|_| WsError::Reserved)?
        else {
            input.advance(taken);
            return Ok(false);
        };
        let header_bytes = usize::try_from(cursor.position()).expect("at most 14");
        input.advance(header_bytes - torn);
        self.torn_header.clear();
        self.begin(&header, length)?;
        Ok(true)
    }

    fn begin(&mut self, header: &FrameHeader, length: u64) -> Result<(), WsError> {
        if header.rsv1 || header.rsv2 || header.rsv3 {
            return Err(WsError::Reserved);
        }
        self.mask = header.mask.ok_or(WsError::Unmasked)?;
        self.mask_offset = 0;
        self.remaining = length;
        match header.opcode {
            OpCode::Data(Data::Binary | Data::Continue) => {
                let continues = header.opcode == OpCode::Data(Data::Continue);
                if continues != self.in_message {
                    return Err(WsError::Fragments);
                }
                self.in_message = !header.is_final;
            }
            OpCode::Data(Data::Text) => return Err(WsError::Text),
            OpCode::Control(control @ (Control::Close | Control::Ping | Control::Pong)) => {
                if !header.is_final || length > 125 {
                    return Err(WsError::Control);
                }
                self.control = Some((control, Vec::new()));
            }
            OpCode::Data(Data::Reserved(_)) | OpCode::Control(Control::Reserved(_)) => {
                return Err(WsError::Reserved);
            }
        }
        Ok(())
    }

    fn read_payload(&mut self, input: &mut &[u8], out: &mut BytesMut) {
        let taken = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(input.len());
        let unmasked = input[..taken]
            .iter()
            .zip(self.mask.iter().cycle().skip(self.mask_offset))
            .map(|(byte, mask)| byte ^ mask);
        match &mut self.control {
            Some((_, payload)) => payload.extend(unmasked),
            None => out.extend(unmasked),
        }
        self.mask_offset = (self.mask_offset + taken) % 4;
        self.remaining -= taken as u64;
        input.advance(taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn masked(opcode: u8, last: bool, payload: &[u8]) -> Vec<u8> {
        let mask = [7u8, 77, 177, 250];
        let mut frame = vec![opcode | if last { 0x80 } else { 0 }];
        match payload.len() {
            length @ 0..=125 => frame.push(0x80 | length as u8),
            length => {
                frame.push(0x80 | 126);
                frame.extend((length as u16).to_be_bytes());
            }
        }
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b));
        frame
    }

    #[test]
    fn refused_frames_say_why() {
        let cases: &[(Vec<u8>, WsError)] = &[
            (vec![0x82, 1, 0], WsError::Unmasked),
            (masked(0x1, true, b"x"), WsError::Text),
            (masked(0x0, true, b"x"), WsError::Fragments),
            (masked(0x2 | 0x40, true, b"x"), WsError::Reserved),
            (masked(0x3, true, b"x"), WsError::Reserved),
            (masked(0x9, false, b"x"), WsError::Control),
            (masked(0x9, true, &[0; 126]), WsError::Control),
            (
                [masked(0x2, false, b"x"), masked(0x2, true, b"x")].concat(),
                WsError::Fragments,
            ),
        ];
        for (bytes, error) in cases {
            let result = Deframer::default().feed(bytes, &mut BytesMut::new());
            assert_eq!(result.err().as_ref(), Some(error), "{bytes:?}");
        }
    }

    #[test]
    fn an_upgrade_needs_the_subprotocol() {
        let request = |protocol: &str| {
            format!(
                "GET /mqtt HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                 Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{protocol}\r\n"
            )
        };
        let good = request("Sec-WebSocket-Protocol: mqttv3.1, mqtt\r\n");
        for cut in 0..good.len() {
            assert_eq!(upgrade(&good.as_bytes()[..cut]), Ok(None), "cut at {cut}");
        }
        let (used, response) = upgrade(good.as_bytes()).unwrap().unwrap();
        let response = String::from_utf8(response).unwrap().to_lowercase();
        assert_eq!(used, good.len());
        assert!(response.starts_with("http/1.1 101"), "{response}");
        assert!(
            response.contains("sec-websocket-protocol: mqtt\r\n"),
            "{response}"
        );
        assert_eq!(upgrade(request("").as_bytes()), Err(WsError::Subprotocol));
        assert!(matches!(
            upgrade(b"POST / HTTP/1.1\r\n\r\n"),
            Err(WsError::Upgrade(_))
        ));
    }

    proptest! {
        #[test]
        fn any_cutting_into_frames_and_segments_gives_the_same_stream(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..5),
            ping in any::<bool>(),
            segment in 1usize..40,
        ) {
            let mut wire = Vec::new();
            for (number, payload) in frames.iter().enumerate() {
                let opcode = if number == 0 { 0x2 } else { 0x0 };
                wire.extend(masked(opcode, number + 1 == frames.len(), payload));
                if ping { wire.extend(masked(0x9, true, b"hello")); }
            }
            let mut deframer = Deframer::default();
            let (mut out, mut answers) = (BytesMut::new(), Vec::new());
            for part in wire.chunks(segment) {
                answers.extend(deframer.feed(part, &mut out).unwrap().frames);
            }
            prop_assert_eq!(&out[..], frames.concat());
            let pong = [&[0x8A, 5][..], b"hello"].concat();
            prop_assert_eq!(answers, if ping { pong.repeat(frames.len()) } else { Vec::new() });
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Deframer::default().feed(&bytes, &mut BytesMut::new());
            let _ = upgrade(&bytes);
        }
    }
}
