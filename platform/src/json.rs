//! Reads the JSON of a request as grpc-gateway v2 does, straight into the message: no tree of the
//! body is built, so that a body costs little more memory than its own bytes. The protobuf
//! descriptor says which fields there are.

mod number;
mod request;
mod scan;
mod wire;

use prost::Message;
use prost_reflect::MessageDescriptor;

use self::request::Request;
use crate::error::{Code, Fault};

/// Levels of objects and arrays, the body's own among them. The contract has three.
pub const NESTING: usize = 32;
/// Entries of one repeated field. `orders.max_lines` is the bound of an order; this one is of what
/// is read at all.
pub const ENTRIES: usize = 10_000;

/// Reads `body` as the message `shape`, which is that of `M`. An empty body is `{}`.
///
/// Integers are numbers or strings, both spellings of a field name are read, nulls and unknown
/// fields are ignored.
///
/// # Errors
/// INVALID_ARGUMENT: with line and column if the body is no JSON, with every wrong field if it is.
/// A field given twice is wrong, and so is one that is spelled in other upper and lower case.
pub fn read<M: Message + Default>(shape: &MessageDescriptor, body: &[u8]) -> Result<M, Fault> {
    let text = std::str::from_utf8(body).map_err(|error| {
        let at = error.valid_up_to();
        invalid(format!("the body is not UTF-8 from byte {at} on"))
    })?;
    let json = text.trim_ascii();
    if json.is_empty() {
        return Ok(M::default());
    }
    scan::check(text).map_err(|(what, at)| invalid(format!("{what} ({})", place(text, at))))?;
    let mut request = Request::default();
    let start = text.len() - text.trim_ascii_start().len();
    request
        .read(shape, json)
        .map_err(|error| syntax(text, start, &error))?;
    M::decode(request.finish()?.as_slice()).map_err(|error| {
        tracing::error!(error = %error, "a request was read as what is no message");
        Fault::new(Code::Internal, "internal error")
    })
}

fn invalid(message: impl Into<String>) -> Fault {
    Fault::new(Code::InvalidArgument, message)
}

/// serde_json's own words for a mistake in the syntax, placed in the whole of `text`; it has read
/// on from `start`.
fn syntax(text: &str, start: usize, error: &serde_json::Error) -> Fault {
    let lines = text.as_bytes()[start..].split(|byte| *byte == b'\n');
    let before: usize = lines
        .take(error.line().saturating_sub(1))
        .map(|line| line.len() + 1)
        .sum();
    let at = (start + before + error.column().saturating_sub(1)).min(text.len());
    let said = error.to_string();
    let said = said.split(" at line ").next().unwrap_or_default();
    invalid(format!(
        "the body is not JSON: {said} ({})",
        place(text, at)
    ))
}

/// Where byte `at` is, in lines and bytes from 1.
fn place(text: &str, at: usize) -> String {
    let before = &text.as_bytes()[..at];
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let column = before
        .iter()
        .rev()
        .take_while(|byte| **byte != b'\n')
        .count()
        + 1;
    format!("line {line}, column {column}")
}

#[cfg(test)]
mod corpus;
#[cfg(test)]
mod refusals;

#[cfg(test)]
mod tests {
    use prost::Name;
    use prost_reflect::DescriptorPool;

    use super::*;

    pub(super) fn read<M: Message + Name + Default>(body: impl AsRef<[u8]>) -> Result<M, Fault> {
        let contract = DescriptorPool::decode(proto::DESCRIPTORS).unwrap();
        let shape = contract.get_message_by_name(&M::full_name()).unwrap();
        super::read(&shape, body.as_ref())
    }
}
