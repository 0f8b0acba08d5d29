//! Integers out of decimal text, exactly. A float in between would be another integer beyond 2^53.

/// The integer that a JSON number is, however it is written; `None` for a fraction, and for what is
/// far beyond 64 bits.
pub(super) fn of_number(text: &str) -> Option<i128> {
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent_of(exponent)?),
        None => (text, 0),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((whole, fraction)) if is_digits(fraction) => (whole, fraction),
        Some(_) => return None,
        None => (mantissa, ""),
    };
    let has_leading_zero = whole.len() > 1 && whole.starts_with('0');
    if !is_digits(whole) || has_leading_zero {
        return None;
    }
    scaled(negative, whole, fraction, exponent)
}

/// The integer that a string is: a JSON number, or digits with leading zeros or a plus, which
/// clients have always sent.
pub(super) fn of_string(text: &str) -> Option<i128> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if is_digits(digits) {
        return scaled(text.starts_with('-'), digits, "", 0);
    }
    of_number(text)
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// An exponent that does not fit is as good as the greatest one that does.
fn exponent_of(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !is_digits(digits) {
        return None;
    }
    let exponent: i64 = digits.parse().unwrap_or(i64::MAX / 2);
    Some(if text.starts_with('-') {
        -exponent
    } else {
        exponent
    })
}

/// `whole.fraction` times ten to the power of `exponent`, if that is an integer.
fn scaled(negative: bool, whole: &str, fraction: &str, exponent: i64) -> Option<i128> {
    let mut value: i128 = 0;
    // zeros are multiplied in when another digit follows: those at the end are part of the scale
    let mut zeros: u32 = 0;
    for digit in whole
        .bytes()
        .chain(fraction.bytes())
        .map(|byte| byte - b'0')
    {
        if digit == 0 {
            zeros = zeros.saturating_add(1);
            continue;
        }
        if value > 0 {
            value = value.checked_mul(10_i128.checked_pow(zeros)?)?;
        }
        value = value.checked_mul(10)?.checked_add(i128::from(digit))?;
        zeros = 0;
    }
    if value == 0 {
        return Some(0);
    }
    let scale = exponent.saturating_sub(i64::try_from(fraction.len()).ok()?) + i64::from(zeros);
    // below 0 it is a fraction: the last digit of `value` is not 0
    let value = value.checked_mul(10_i128.checked_pow(u32::try_from(scale).ok()?)?)?;
    Some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_exactly() {
        let same = [
            ("0", 0),
            ("-0", 0),
            ("-0.000e-7", 0),
            ("0e99999999999999999999", 0),
            ("7", 7),
            ("7.00", 7),
            ("0.07e2", 7),
            ("7000e-3", 7),
            ("7000.00e-3", 7),
            ("-1.5e1", -15),
            ("1E2", 100),
            ("1e+16", 10_000_000_000_000_000),
            ("100200300", 100_200_300),
            ("9007199254740993.0", 9_007_199_254_740_993),
            ("9007199254740993000e-3", 9_007_199_254_740_993),
            ("18446744073709551615", i128::from(u64::MAX)),
            ("-9223372036854775808", i128::from(i64::MIN)),
        ];
        for (text, value) in same {
            assert_eq!(of_number(text), Some(value), "{text}");
            assert_eq!(of_string(text), Some(value), "{text}");
        }
        for (text, value) in [("+7", 7), ("007", 7), ("-007", -7), ("+0", 0)] {
            assert_eq!(of_string(text), Some(value), "{text}");
            assert_eq!(of_number(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_no_integer_is_none() {
        let none = [
            "",
            "-",
            "+",
            "--1",
            "+-1",
            ".",
            "1.",
            ".5",
            "1.5",
            "0.1",
            "1e-1",
            "15e-2",
            "1e",
            "e1",
            "1e+",
            "1e1.0",
            "+1e2",
            "01.0",
            "01e1",
            " 1",
            "1 ",
            "0x10",
            "1_000",
            "٣",
            "NaN",
            "Infinity",
            "1.0000000000000000000001",
            "1e-400",
        ];
        for text in none {
            assert_eq!(of_string(text), None, "{text}");
        }
    }

    #[test]
    fn great_numbers_cost_nothing() {
        let digits = "9".repeat(1 << 20);
        let zeros = format!("1{}1", "0".repeat(1 << 20));
        let exponents = [
            "1e400",
            "1e9999999999999999999999",
            "1e-9999999999999999999999",
        ];
        for text in exponents.into_iter().chain([&*digits, &*zeros]) {
            assert_eq!(of_string(text), None);
        }
        let long_one = format!("0.{}1e{}", "0".repeat(99_999), 100_000);
        assert_eq!(of_number(&long_one), Some(1));
    }
}
