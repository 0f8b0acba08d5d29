//! The broker away for a while under load: orders go on and nobody sees an error, events wait, and when it is back every one
//! of them arrives, once and in order.

use devstack::{broker, chaos::Counts};

use crate::chaos::{carry_out, plan, start_on};

#[tokio::test(flavor = "multi_thread")]
async fn without_a_broker_orders_go_on_and_events_wait() {
    let counts = Counts {
        outages: 1,
        ..Counts::default()
    };
    let plan = plan(counts, 8);
    // the brokers that the tests were given may not be taken away
    let mut stack = start_on(&plan, broker::Source::Mock).await;
    let (report, _) = carry_out(&mut stack, &plan).await;
    let line = report.line();
    assert_eq!(report.broker_outages, 1);
    let failures = [
        report.unavailable,
        report.deadline_exceeded,
        report.broken_connections,
        report.resource_exhausted,
    ];
    assert_eq!(failures, [0; 4], "callers noticed: {line}");
    eprintln!("{line}");
    stack.stop().await.expect("the stack stops");
}
