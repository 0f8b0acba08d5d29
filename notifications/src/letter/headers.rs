//! The headers of a record as bytes, in one column: their order and names that come twice are kept, and a value is bytes or
//! missing. Each name and value after its length, 4 bytes, the most significant first; a missing value has the length -1.

use rdkafka::message::{Header, Headers as _, OwnedHeaders};

/// What is no value.
const MISSING: i32 = -1;

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
}
