//! The headers of a record as bytes, in one column: their order and names that come twice are kept,
//! and a value is bytes or missing. Each name and value after its length, 4 bytes, the most
//! significant first; a missing value has the length -1.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rdkafka::{
    Message as _,
    message::{BorrowedMessage, Header, Headers, OwnedHeaders, OwnedMessage},
};

/// What is no value.
const MISSING: i32 = -1;

/// A record of its own, without the headers whose names are no text: rdkafka panics where such a
/// name is read, which would end the reading of the partition for ever.
pub fn detach(message: &BorrowedMessage<'_>) -> OwnedMessage {
    let record = message.detach();
    let readable = record.headers().and_then(without_unreadable);
    match readable {
        Some(headers) => record.replace_headers(Some(headers)),
        None => record,
    }
}

/// `None`: all can be read.
fn without_unreadable<H: Headers>(headers: &H) -> Option<OwnedHeaders> {
    let can_be_read =
        |index| catch_unwind(AssertUnwindSafe(|| headers.get(index).key.len())).is_ok();
    let all = 0..headers.count();
    if all.clone().all(can_be_read) {
        return None;
    }
    let readable = all.filter(|index| can_be_read(*index));
    Some(readable.fold(OwnedHeaders::new(), |kept, index| {
        kept.insert(headers.get(index))
    }))
}

/// The headers, if there are any.
pub fn encode(headers: Option<&OwnedHeaders>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for header in headers.into_iter().flat_map(|all| all.iter()) {
        put(&mut bytes, Some(header.key.as_bytes()));
        put(&mut bytes, header.value);
    }
    bytes
}

/// Its inverse; what does not fit the form is left out.
pub fn decode(mut bytes: &[u8]) -> OwnedHeaders {
    let mut headers = OwnedHeaders::new();
    while let Some((name, rest)) = take(bytes) {
        let Some((value, rest)) = take(rest) else {
            break;
        };
        if let Some(Ok(key)) = name.map(std::str::from_utf8) {
            headers = headers.insert(Header { key, value });
        }
        bytes = rest;
    }
    headers
}

fn put(bytes: &mut Vec<u8>, part: Option<&[u8]>) {
    // Kafka has lengths of 32 bits itself
    let length = part.map_or(MISSING, |part| i32::try_from(part.len()).unwrap_or(0));
    bytes.extend(length.to_be_bytes());
    bytes.extend(part.into_iter().flatten());
}

fn take(bytes: &[u8]) -> Option<(Option<&[u8]>, &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    let length = i32::from_be_bytes(*length);
    if length == MISSING {
        return Some((None, rest));
    }
    let (part, rest) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    Some((Some(part), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Pairs<'a> = Vec<(&'a str, Option<&'a [u8]>)>;

    fn pairs(headers: &OwnedHeaders) -> Pairs<'_> {
        headers
            .iter()
            .map(|header| (header.key, header.value))
            .collect()
    }

    #[test]
    fn headers_come_back_as_they_were() {
        let wanted: Pairs<'_> = vec![
            ("traceparent", Some(b"00-ab")),
            ("", Some(b"")),
            ("twice", Some(b"\0\xff")),
            ("twice", None),
        ];
        let headers = wanted
            .iter()
            .fold(OwnedHeaders::new(), |all, (key, value)| {
                all.insert(Header { key, value: *value })
            });
        let bytes = encode(Some(&headers));
        assert_eq!(pairs(&decode(&bytes)), wanted);
        for cut in 0..bytes.len() {
            let left = decode(&bytes[..cut]);
            assert!(wanted.starts_with(&pairs(&left)), "cut at {cut}");
        }
        assert_eq!(encode(None), b"");
        assert!(pairs(&decode(b"")).is_empty());
    }

    /// As rdkafka is with a name that is no UTF-8.
    struct Broken;

    impl Headers for Broken {
        fn count(&self) -> usize {
            3
        }

        fn try_get(&self, index: usize) -> Option<Header<'_, &[u8]>> {
            let key = ["a", "\u{0}", "c"].get(index)?;
            assert_ne!(index, 1, "no text");
            Some(Header { key, value: None })
        }
    }

    #[test]
    fn a_header_that_cannot_be_read_is_left_out_and_the_others_are_kept() {
        let kept = without_unreadable(&Broken).unwrap();
        assert_eq!(pairs(&kept), [("a", None), ("c", None)]);
        assert!(without_unreadable(&kept).is_none());
    }
}
