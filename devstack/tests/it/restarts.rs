//! PostgreSQL restarted in immediate mode under load: callers see UNAVAILABLE and nothing else, every service is back
//! within 5 s of its database by itself, and retries with a key make no second order.
//! `CHAOS_RESTARTS=5` for more, `CHAOS_SEED` for the same again.

use devstack::chaos::Counts;

use crate::chaos::{carry_out, plan, size, start};

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_database_is_an_outage_and_no_loss() {
    let restarts = size("CHAOS_RESTARTS", 2);
    let counts = Counts {
        restarts,
        ..Counts::default()
    };
    let plan = plan(counts, 5 * restarts as u64);
    let mut stack = start(&plan).await;
    let (report, _) = carry_out(&mut stack, &plan).await;
    let line = report.line();
    assert_eq!(report.database_restarts, restarts);
    assert!(report.unavailable > 0, "nobody met the outage: {line}");
    let others = [
        report.deadline_exceeded,
        report.cancelled,
        report.broken_connections,
        report.resource_exhausted,
    ];
    assert_eq!(
        others, [0; 4],
        "callers saw other codes than UNAVAILABLE: {line}"
    );
    assert!(
        report.recovery_max_s.is_some_and(|seconds| seconds <= 5.0),
        "{line}"
    );
    eprintln!("{line}");
    stack.stop().await.expect("the stack stops");
}
