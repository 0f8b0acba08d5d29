//! The one message of a call, read before there is a call: room is taken for its length, not for
//! what its sender may yet send.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt as _;
use hyper::body::{Bytes, Frame};
use tonic::{Status, body::Body};

use crate::{
    admission::{Admission, Part, Share},
    error::{Code, Fault},
    grpc::{DETAILS, code_of},
    line::Line,
};

/// A flag and a length.
const PREFIX: usize = 5;

/// Bytes of memory that a header takes beside its own.
const HEADER: usize = 64;
/// As much is free: no usual call has more.
const FREE_HEADERS: usize = 4 * 1024;

/// Bytes of a refusal's details that take no room: those of one reason, no list of fields.
const SMALL_DETAILS: usize = 512;

/// Room for headers that are many: compressed, they are sent for much less than they take here.
///
/// # Errors
/// There is none.
pub(super) fn room_of_headers(
    headers: &HeaderMap,
    admission: &Admission,
    share: &Arc<Share>,
) -> Result<Option<Part>, Fault> {
    let sizes = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + HEADER);
    match sizes.sum::<usize>().saturating_sub(FREE_HEADERS) {
        0 => Ok(None),
        bytes => Ok(Some(admission.bytes(share, bytes)?)),
    }
}

/// Room for a refusal's details until the socket has them; where there is none, they are left out.
pub(super) fn room_of_details(
    headers: &mut HeaderMap,
    admission: &Admission,
    share: &Arc<Share>,
    line: Option<&Line>,
) {
    let bytes = headers.get(DETAILS).map_or(0, HeaderValue::len);
    if bytes <= SMALL_DETAILS {
        return;
    }
    match (admission.bytes(share, bytes), line) {
        (Ok(room), Some(line)) => line.leave(room),
        (Ok(_), None) => {}
        (Err(_), _) => {
            headers.remove(DETAILS);
        }
    }
}

/// A message with its prefix, and the room that it takes.
pub(super) struct Message {
    pub(super) data: Bytes,
    pub(super) held: Part,
}

/// Reads a message of at most `limit` bytes to the end of its stream.
///
/// # Errors
/// INVALID_ARGUMENT: there is none, it breaks off, something follows it. RESOURCE_EXHAUSTED: it is
/// too large, or there is no room. CANCELLED: its sender has gone.
pub(super) async fn read(
    mut body: Body,
    limit: usize,
    admission: &Admission,
    share: &Arc<Share>,
) -> Result<Message, Fault> {
    let mut data = Vec::new();
    let mut expected: Option<(usize, Part)> = None;
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.map_err(broken_off).map(Frame::into_data)? else {
            continue;
        };
        if expected.is_none() {
            data.extend_from_slice(&piece);
            if data.len() < PREFIX {
                continue;
            }
            let (length, room) = announced(&data, limit)?;
            let held = admission.bytes(share, room).map_err(Fault::from)?;
            data.reserve_exact((PREFIX + length).saturating_sub(data.len()));
            expected = Some((PREFIX + length, held));
        } else {
            data.extend_from_slice(&piece);
        }
        if expected
            .as_ref()
            .is_some_and(|(length, _)| data.len() > *length)
        {
            return Err(invalid("a call has one message, this one has more"));
        }
    }
    match expected {
        Some((length, held)) if length == data.len() => Ok(Message {
            data: data.into(),
            held,
        }),
        None if data.is_empty() => Err(invalid("a call has one message, this one has none")),
        _ => Err(invalid("the message breaks off")),
    }
}

/// Bytes that a compressed byte may become at most: zlib's "Maximum Compression Factor",
/// zlib.net/zlib_tech.html.
const DEFLATE: usize = 1_032;

/// The length that the prefix says, and the bytes to make room for. A compressed message needs its
/// own bytes and what it may become.
fn announced(data: &[u8], limit: usize) -> Result<(usize, usize), Fault> {
    let [flag, length @ ..] = data else {
        return Err(invalid("the message breaks off"));
    };
    let length = length.first_chunk().copied().map(u32::from_be_bytes);
    let length = usize::try_from(length.unwrap_or_default()).unwrap_or(usize::MAX);
    if length > limit {
        let message = format!("the message has {length} bytes, at most {limit} are allowed");
        return Err(Fault::new(Code::ResourceExhausted, message));
    }
    match flag {
        0 => Ok((length, PREFIX + length)),
        1 => {
            let becomes = length.saturating_mul(DEFLATE).min(limit);
            Ok((length, PREFIX + length + becomes))
        }
        _ => Err(invalid("the message does not begin as gRPC has it")),
    }
}

/// How tonic and prost say INTERNAL of a message that they cannot read. It is its sender's fault,
/// and nothing of ours is broken; a test of every RPC holds these words against what they say.
const UNREADABLE: [&str; 3] = [
    "failed to decode Protobuf message",
    "Error decompressing",
    "protocol error: received message with compressed-flag",
];

/// The refusal of a message that tonic could not read.
pub(super) fn unreadable(headers: &HeaderMap) -> Option<Fault> {
    if code_of(headers) != tonic::Code::Internal {
        return None;
    }
    let status = Status::from_header_map(headers)?;
    let known = UNREADABLE
        .iter()
        .any(|text| status.message().starts_with(text));
    known.then(|| {
        Fault::new(
            Code::InvalidArgument,
            "the message cannot be read: it is not what this method takes",
        )
    })
}

fn invalid(message: &str) -> Fault {
    Fault::new(Code::InvalidArgument, message)
}

fn broken_off(_: Status) -> Fault {
    Fault::new(Code::Cancelled, "the caller has gone")
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use http_body_util::StreamBody;

    use super::*;
    use crate::config::Limits;

    async fn sent(pieces: &[&[u8]]) -> Result<Vec<u8>, Code> {
        let admission = Admission::new(&Limits {
            memory: 4_000,
            ..Limits::default()
        });
        let frames: Vec<Result<_, tonic::Status>> = pieces
            .iter()
            .map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece))))
            .collect();
        let body = Body::new(StreamBody::new(stream::iter(frames)));
        let read = read(body, 100, &admission, &Arc::default()).await;
        read.map(|message| message.data.to_vec())
            .map_err(|fault| fault.code)
    }

    #[tokio::test]
    async fn one_message_however_it_is_cut_and_nothing_else() {
        let whole: &[u8] = &[0, 0, 0, 0, 3, 7, 8, 9];
        assert_eq!(sent(&[whole]).await.unwrap(), whole);
        let bytes: Vec<&[u8]> = whole.chunks(1).collect();
        assert_eq!(sent(&bytes).await.unwrap(), whole);
        assert_eq!(sent(&[&[0; 5]]).await.unwrap(), [0; 5]);
        for (pieces, expected) in [
            (vec![], Code::InvalidArgument),
            (vec![&whole[..2]], Code::InvalidArgument),
            (vec![&whole[..7]], Code::InvalidArgument),
            (vec![whole, &[0]], Code::InvalidArgument),
            (vec![&[2, 0, 0, 0, 0][..]], Code::InvalidArgument),
            (vec![&[0, 0, 0, 0, 101][..]], Code::ResourceExhausted),
            (vec![&[0, 255, 255, 255, 255][..]], Code::ResourceExhausted),
        ] {
            assert_eq!(sent(&pieces).await.unwrap_err(), expected, "{pieces:?}");
        }
    }

    #[test]
    fn long_details_have_room_or_are_left_out() {
        let admission = Admission::new(&Limits {
            memory: 1_000,
            ..Limits::default()
        });
        let has_details = |bytes: usize| {
            let value = HeaderValue::from_str(&"x".repeat(bytes)).unwrap();
            let mut headers = HeaderMap::from_iter([(DETAILS.parse().unwrap(), value)]);
            room_of_details(&mut headers, &admission, &Arc::default(), None);
            headers.contains_key(DETAILS)
        };
        assert!(has_details(900));
        let taken = admission.bytes(&Arc::default(), 200).unwrap();
        assert!(has_details(SMALL_DETAILS));
        assert!(!has_details(900));
        drop(taken);
        assert!(has_details(900));
    }
}
