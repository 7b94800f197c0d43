//! Framing: `COBS(postcard(message) ++ crc32_le)`, then one zero byte.
//!
//! A zero byte cannot occur inside a frame, so a reader that starts in the middle or loses bytes finds the next
//! frame by itself, and the CRC-32 (IEEE) tells a damaged frame from a whole one.
//!
//! Source: S. Cheshire, M. Baker, "Consistent Overhead Byte Stuffing", 1999.

use crate::Message;
use alloc::vec::Vec;
use crc::{CRC_32_ISO_HDLC, Crc};

/// The CRC-32 of IEEE 802.3.
const CRC32: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// Longest frame a reader accepts, in bytes.
pub const MAX_FRAME_BYTES: usize = 4 << 20;

/// A frame that is not a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WireError {
    /// Not valid COBS, or shorter than a checksum.
    Framing,
    /// The checksum differs: bytes were lost or changed.
    Checksum,
    /// The bytes are whole but are not a message of this protocol.
    Schema,
    /// Longer than [`MAX_FRAME_BYTES`].
    TooLong,
}

impl core::fmt::Display for WireError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            WireError::Framing => {
                "a frame on the wire is not COBS-encoded; the guest wrote something else to this port"
            }
            WireError::Checksum => "a frame on the wire failed its CRC-32; bytes were lost or changed",
            WireError::Schema => "a frame is intact but not a known message; guest and host are different builds",
            WireError::TooLong => "a frame on the wire has no end within 4 MiB",
        })
    }
}

impl core::error::Error for WireError {}

/// One message as the bytes to send, terminator included.
///
/// A [`Message::Hello`] also begins with a terminator, which cuts off whatever firmware wrote to the port before.
///
/// # Panics
/// Never in practice: every [`Message`] serialises.
pub fn encode(message: &Message) -> Vec<u8> {
    let mut body = postcard::to_allocvec(message).expect("messages hold only serialisable types");
    let crc = CRC32.checksum(&body);
    body.extend_from_slice(&crc.to_le_bytes());
    let mut out = Vec::with_capacity(body.len() + body.len() / 254 + 3);
    if matches!(message, Message::Hello { .. }) {
        out.push(0);
    }
    cobs(&body, &mut out);
    out.push(0);
    out
}

/// Appends the encoding of `data` to `out`.
fn cobs(data: &[u8], out: &mut Vec<u8>) {
    let mut code_at = out.len();
    out.push(1);
    for &byte in data {
        if byte == 0 {
            code_at = out.len();
            out.push(1);
        } else {
            out.push(byte);
            out[code_at] += 1;
            if out[code_at] == 0xff {
                code_at = out.len();
                out.push(1);
            }
        }
    }
}

fn uncobs(frame: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(frame.len());
    let mut rest = frame;
    while let Some((&code, after)) = rest.split_first() {
        let run = usize::from(code).checked_sub(1)?;
        if run > after.len() {
            return None;
        }
        out.extend_from_slice(&after[..run]);
        rest = &after[run..];
        if code != 0xff && !rest.is_empty() {
            out.push(0);
        }
    }
    Some(out)
}

fn decode(frame: &[u8]) -> Result<Message, WireError> {
    let body = uncobs(frame).ok_or(WireError::Framing)?;
    let at = body.len().checked_sub(4).ok_or(WireError::Framing)?;
    let (body, crc) = body.split_at(at);
    if CRC32.checksum(body).to_le_bytes() != crc {
        return Err(WireError::Checksum);
    }
    postcard::from_bytes(body).map_err(|_| WireError::Schema)
}

/// Turns received bytes into messages.
#[derive(Default)]
pub struct Decoder {
    frame: Vec<u8>,
    overflow: bool,
}

impl Decoder {
    /// Takes in `bytes` and returns what they complete, in order.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Result<Message, WireError>> {
        let mut out = Vec::new();
        for &byte in bytes {
            if byte != 0 {
                if self.frame.len() < MAX_FRAME_BYTES {
                    self.frame.push(byte);
                } else {
                    self.overflow = true;
                }
            } else if core::mem::take(&mut self.overflow) {
                self.frame.clear();
                out.push(Err(WireError::TooLong));
            } else if !self.frame.is_empty() {
                out.push(decode(&self.frame));
                self.frame.clear();
            }
        }
        out
    }

    /// Bytes of an unfinished frame: not zero at the end of a session means the guest died while sending.
    pub fn pending_bytes(&self) -> usize {
        self.frame.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ExitStatus, Level};
    use alloc::string::String;
    use alloc::vec;

    #[test]
    fn frames_round_trip_in_any_chunking() {
        let messages = [
            Message::Note { level: Level::Info, text: String::from("\0zeros\0") },
            Message::Tokens { ids: (0..=255).collect() },
            Message::Tokens { ids: vec![1; 700] },
            Message::End { status: ExitStatus::Pass, messages: 3 },
        ];
        let bytes: Vec<u8> = messages.iter().flat_map(encode).collect();
        for chunk in [1, 3, 254, 255, 256, bytes.len()] {
            let mut decoder = Decoder::default();
            let got: Vec<_> = bytes.chunks(chunk).flat_map(|c| decoder.push(c)).collect();
            assert_eq!(got, messages.iter().cloned().map(Ok).collect::<Vec<_>>(), "chunks of {chunk}");
            assert_eq!(decoder.pending_bytes(), 0);
        }
    }

    #[test]
    fn a_hello_survives_noise_before_it() {
        let hello =
            Message::Hello { protocol: crate::PROTOCOL, image: crate::ImageKind::Jit, build_id: String::from("b") };
        let mut bytes = b"firmware \x1b[2J console".to_vec();
        bytes.extend(encode(&hello));
        let got = Decoder::default().push(&bytes);
        assert_eq!(got.len(), 2);
        assert!(got[0].is_err());
        assert_eq!(got[1], Ok(hello));
    }

    #[test]
    fn every_changed_byte_is_noticed_and_the_next_frame_survives() {
        let first = encode(&Message::Note { level: Level::Warning, text: String::from("snapshot refused") });
        let second = Message::End { status: ExitStatus::Fatal, messages: 1 };
        for at in 0..first.len() - 1 {
            for flip in [0x01, 0x80] {
                let mut bytes = first.clone();
                bytes[at] ^= flip;
                bytes.extend(encode(&second));
                let got = Decoder::default().push(&bytes);
                assert!(got[0].is_err(), "byte {at} flip {flip:#x}");
                assert_eq!(got.last(), Some(&Ok(second.clone())));
            }
        }
    }

    #[test]
    fn statuses_map_to_exit_codes() {
        for (status, code) in
            [(ExitStatus::Pass, 33), (ExitStatus::TestFailed, 35), (ExitStatus::Panic, 37), (ExitStatus::Fatal, 39)]
        {
            assert_eq!(status.qemu_exit_code(), code);
            assert_eq!(ExitStatus::from_qemu_exit_code(code), Some(status));
        }
        assert_eq!(ExitStatus::from_qemu_exit_code(0), None);
    }
}
