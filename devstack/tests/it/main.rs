//! What spans services, on the real ones: each test has a stack of its own.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]
#![expect(
    clippy::too_many_lines,
    reason = "a table of refusals is read from top to bottom"
)]

mod caller;
mod test_stack;

mod bad_input;
mod command_line;
mod order_refusals;
mod purchase;
mod refusals;
mod replay;

mod model;
