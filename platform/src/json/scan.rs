//! What serde_json lets pass in a value that it ignores: nesting without a bound, and half a
//! surrogate pair. One look over the text, before anything is read of it.

use super::NESTING;

/// Looks at the brackets and escapes of `text`; its syntax is not checked.
///
/// # Errors
/// What is wrong, and the byte that it is at.
pub(super) fn check(text: &str) -> Result<(), (&'static str, usize)> {
    let bytes = text.as_bytes();
    let (mut at, mut depth, mut in_string) = (0, 0_usize, false);
    while let Some(&byte) = bytes.get(at) {
        match (in_string, byte) {
            (_, b'"') => in_string = !in_string,
            (true, b'\\') => {
                at += escape(&bytes[at..])
                    .ok_or(("the body is not JSON: half a surrogate pair", at))?;
                continue;
            }
            (false, b'[' | b'{') if depth == NESTING => {
                return Err(("the body is nested deeper than 32 levels", at));
            }
            (false, b'[' | b'{') => depth += 1,
            (false, b']' | b'}') => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    Ok(())
}

/// The length of the escape that `bytes` begin with, with both halves of a pair; `None` for half a
/// pair.
fn escape(bytes: &[u8]) -> Option<usize> {
    match unit(bytes) {
        Some(0xd800..=0xdbff) => {
            let low = unit(bytes.get(6..)?)?;
            (0xdc00..=0xdfff).contains(&low).then_some(12)
        }
        Some(0xdc00..=0xdfff) => None,
        Some(_) => Some(6),
        None => Some(2),
    }
}

/// The UTF-16 unit of `\uXXXX`.
fn unit(bytes: &[u8]) -> Option<u16> {
    let digits = bytes.get(..6)?.strip_prefix(b"\\u")?;
    let is_hex = digits.iter().all(u8::is_ascii_hexdigit);
    let digits = std::str::from_utf8(digits).ok().filter(|_| is_hex)?;
    u16::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_said_as_it_is() {
        let deep = "[".repeat(NESTING + 1);
        let (said, at) = check(&deep).unwrap_err();
        assert!(said.contains(&format!(" {NESTING} ")), "{said}");
        assert_eq!(at, NESTING);
        assert_eq!(check(&deep[1..]), Ok(()));
    }

    #[test]
    fn brackets_in_strings_and_side_by_side_are_not_nested() {
        let beside = "[]".repeat(100);
        assert_eq!(check(&beside), Ok(()));
        let quoted = format!("\"\\\"{}\"", "[".repeat(100));
        assert_eq!(check(&quoted), Ok(()));
        let after = format!("\"\\\\\"{}", "[".repeat(100));
        assert!(check(&after).is_err());
    }

    #[test]
    fn a_surrogate_has_its_other_half() {
        for whole in [
            r#""\ud83c\udf75""#,
            r#""\uD83C\uDF75""#,
            r#""\\ud83c""#,
            r#""\u00e9""#,
            r#""\u12"#,
            r#""\"#,
        ] {
            assert_eq!(check(whole), Ok(()), "{whole}");
        }
        for half in [
            r#""\ud83c""#,
            r#""\udf75""#,
            r#""\ud83c\ud83c""#,
            r#""\ud83cx\udf75""#,
            r#""\ud83c\n""#,
        ] {
            assert!(check(half).is_err(), "{half}");
        }
    }
}
