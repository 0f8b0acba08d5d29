//! `kill -9` of the real binaries under load, at random moments: every acknowledged order is there, every committed change
//! reaches Kafka at least once and Notifications exactly once, what nobody was told of is whole or absent.
//! `CHAOS_KILLS=30` for more, `CHAOS_SEED` for the same again.

use devstack::chaos::Counts;

use crate::chaos::{carry_out, plan, size, start};

#[tokio::test(flavor = "multi_thread")]
async fn killed_services_lose_nothing_and_do_nothing_twice() {
    let kills = size("CHAOS_KILLS", 6);
    let counts = Counts {
        kills,
        ..Counts::default()
    };
    let plan = plan(counts, 2 * kills as u64);
    let mut stack = start(&plan).await;
    let (report, _) = carry_out(&mut stack, &plan).await;
    assert_eq!(report.kills.iter().sum::<usize>(), kills);
    assert!(
        report.unavailable + report.broken_connections > 0,
        "nobody met a killed service: {}",
        report.line()
    );
    eprintln!("{}", report.line());
    stack.stop().await.expect("the stack stops");
}
