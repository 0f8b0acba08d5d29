//! JSON as grpc-gateway v2 reads it, which is more than proto3 JSON: what clients have sent for years must be read.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Reads a request as grpc-gateway does: nothing is `{}`, nulls are absent, `1.0` and `1e2` are integers.
pub(crate) fn message<Req: DeserializeOwned>(body: &[u8]) -> Result<Req, serde_json::Error> {
    let mut value = match body.trim_ascii() {
        [] => json!({}),
        text => serde_json::from_slice(text)?,
    };
    normalise(&mut value);
    serde_json::from_value(value)
}

fn normalise(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(normalise);
        }
        Value::Array(items) => items.iter_mut().for_each(normalise),
        Value::Number(number) => {
            // beyond 2^53 a float is no longer one integer; proto3 JSON sends those as strings
            if let Some(float) = number.as_f64().filter(|_| number.is_f64())
                && float.fract() == 0.0
                && float.abs() <= 9_007_199_254_740_992.0
            {
                *value = json!(float as i64);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod corpus;

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn read<M: DeserializeOwned>(body: &str) -> Result<M, serde_json::Error> {
        message(body.as_bytes())
    }

    #[test]
    fn bodies_are_read_as_grpc_gateway_reads_them() {
        assert_eq!(read::<Value>("").unwrap(), json!({}));
        assert!(read::<Value>("{").is_err());
    }
}
