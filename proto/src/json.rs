//! What pbjson leaves out of grpc-gateway's JSON: an unset message is `null`, and a time in UTC ends in `Z`. `build.rs`
//! puts every message field of the generated code through [`Field`].

use std::{
    any::Any,
    fmt::{self, Write as _},
};

use pbjson_types::Timestamp;
use serde::{Serialize, Serializer, ser::Error as _};

/// A message field as it is written into a response.
pub(crate) struct Field<'a, M>(pub(crate) &'a Option<M>);

impl<M: Serialize + 'static> Serialize for Field<'_, M> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(message) = self.0 else {
            return serializer.serialize_none();
        };
        match (message as &dyn Any).downcast_ref::<Timestamp>() {
            Some(time) => serializer.serialize_str(&utc(time).map_err(S::Error::custom)?),
            None => message.serialize(serializer),
        }
    }
}

/// RFC 3339 with the `Z` that proto3 JSON asks for, where pbjson writes `+00:00`.
fn utc(time: &Timestamp) -> Result<String, &'static str> {
    /// serde writes a lone string into a formatter as it is, so that the text needs no JSON in between.
    struct Text<'a>(&'a Timestamp);
    impl fmt::Display for Text<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.serialize(f)
        }
    }
    let mut text = String::new();
    write!(text, "{}", Text(time)).map_err(|_| "a time outside the years that can be written")?;
    if let Some(instant) = text.strip_suffix("+00:00").map(str::len) {
        text.truncate(instant);
        text.push('Z');
    }
    Ok(text)
}
