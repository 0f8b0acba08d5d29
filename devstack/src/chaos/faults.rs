//! The faults: services killed, the broker taken away, the database restarted as by a crash, at moments that follow from a
//! seed. The three kinds run beside each other and may meet.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::{Rng as _, rngs::StdRng, seq::SliceRandom as _};

use super::calls::Ledger;
use crate::{
    binaries::SERVICES, broker::Broker, failure::Refused, postgres::Server, service::Service,
    stack::Stack,
};

/// A service that cannot start because the database is away is started again, as a supervisor does.
const START_AGAIN: Duration = Duration::from_millis(200);
/// So long it is tried.
const START_BOUND: Duration = Duration::from_secs(30);

/// One service, killed and started again.
#[derive(Debug, Clone, Copy)]
struct Kill {
    at: Duration,
    /// Its index in [`SERVICES`].
    service: usize,
    /// How long it stays down.
    pause: Duration,
}

/// The broker, away for a while.
#[derive(Debug, Clone, Copy)]
struct Outage {
    at: Duration,
    lasting: Duration,
}

/// How many faults of each kind.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    pub kills: usize,
    pub outages: usize,
    pub restarts: usize,
}

/// What happens when, counted from the beginning of the load.
#[derive(Debug, Clone, Default)]
pub(super) struct Schedule {
    kills: Vec<Kill>,
    outages: Vec<Outage>,
    restarts: Vec<Duration>,
}

impl Schedule {
    /// Draws the moments: one somewhere in each of as many equal parts of the time.
    pub(super) fn draw(random: &mut StdRng, over: Duration, counts: Counts) -> Schedule {
        let mut moments = |count: usize| -> Vec<Duration> {
            let part = over.div_f64(count.max(1) as f64);
            let moment = |n: usize| part.mul_f64(n as f64 + random.random::<f64>());
            (0..count).map(moment).collect()
        };
        let (kills, outages) = (moments(counts.kills), moments(counts.outages));
        let restarts = moments(counts.restarts);
        let mut bag = Vec::new();
        let kills = kills.into_iter().map(|at| {
            if bag.is_empty() {
                bag = (0..SERVICES.len()).collect();
                bag.shuffle(random);
            }
            let at_once = random.random_bool(0.5);
            Kill {
                at,
                service: bag.pop().unwrap_or_default(),
                pause: Duration::from_millis(if at_once {
                    0
                } else {
                    random.random_range(0..1000)
                }),
            }
        });
        let kills = kills.collect();
        let outages = outages.into_iter().map(|at| Outage {
            at,
            lasting: Duration::from_millis(random.random_range(1500..5000)),
        });
        Schedule {
            kills,
            outages: outages.collect(),
            restarts,
        }
    }
}

/// From when to when callers may have met a service that was away. The broker is not in it: orders go on without.
pub(super) type Window = (Instant, Instant);

/// What was done.
#[derive(Debug, Clone, Default)]
pub(super) struct Done {
    /// By service, in the order of [`SERVICES`].
    pub kills: [usize; 3],
    pub outages: usize,
    pub restarts: usize,
    pub windows: Vec<Window>,
}

/// Does it all, beginning now; every fault is put right before this returns.
pub(super) async fn carry_out(
    stack: &mut Stack,
    schedule: &Schedule,
    ledger: &Ledger,
    say: impl Fn(&str),
) -> Result<Done> {
    let (services, broker, postgres) = stack.parts();
    let began = Instant::now();
    let say = |what: &str| say(&format!("{:6.1} s  {what}", began.elapsed().as_secs_f32()));
    let (killed, outages, restarted) = tokio::try_join!(
        kill(services, &schedule.kills, began, &say),
        take_away(broker, &schedule.outages, began, &say),
        restart(postgres, &schedule.restarts, began, ledger, &say),
    )?;
    let mut done = Done {
        outages,
        restarts: restarted.len(),
        windows: restarted,
        ..Done::default()
    };
    for (service, window) in killed {
        done.kills[service] += 1;
        done.windows.push(window);
    }
    for service in services {
        service.check_alive()?;
    }
    Ok(done)
}

async fn until(began: Instant, at: Duration) {
    tokio::time::sleep_until((began + at).into()).await;
}

async fn kill(
    services: &mut [Service],
    kills: &[Kill],
    began: Instant,
    say: &impl Fn(&str),
) -> Result<Vec<(usize, Window)>> {
    let mut done = Vec::new();
    for kill in kills {
        until(began, kill.at).await;
        let service = &mut services[kill.service];
        // one that is not there any more has ended by itself, which is what this is about
        service.check_alive()?;
        say(&format!(
            "kill -9 {}, started again after {:.1} s",
            service.name(),
            kill.pause.as_secs_f32()
        ));
        let from = Instant::now();
        service.kill().await?;
        tokio::time::sleep(kill.pause).await;
        start_again(service).await?;
        service.wait_ready(START_BOUND).await?;
        done.push((kill.service, (from, Instant::now())));
    }
    Ok(done)
}

async fn start_again(service: &mut Service) -> Result<()> {
    let by = Instant::now() + START_BOUND;
    loop {
        match service.start_again().await {
            Ok(()) => return Ok(()),
            Err(error) => ensure!(
                error.is::<Refused>() && Instant::now() < by,
                "{} does not start again: {error:#}",
                service.name()
            ),
        }
        tokio::time::sleep(START_AGAIN).await;
    }
}

async fn take_away(
    broker: &mut Broker,
    outages: &[Outage],
    began: Instant,
    say: &impl Fn(&str),
) -> Result<usize> {
    for outage in outages {
        until(began, outage.at).await;
        say(&format!(
            "broker away, started again after {:.1} s",
            outage.lasting.as_secs_f32()
        ));
        broker.take_away().await?;
        tokio::time::sleep(outage.lasting).await;
        broker.bring_back().await?;
    }
    Ok(outages.len())
}

async fn restart(
    postgres: &mut Server,
    restarts: &[Duration],
    began: Instant,
    ledger: &Ledger,
    say: &impl Fn(&str),
) -> Result<Vec<Window>> {
    let mut windows = Vec::new();
    for at in restarts {
        until(began, *at).await;
        say("PostgreSQL stopped in immediate mode and started again");
        let from = Instant::now();
        postgres.crash().await?;
        ledger.database_gone(from);
        postgres.recover().await?;
        ledger.database_answers();
        windows.push((from, Instant::now()));
    }
    Ok(windows)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn a_seed_draws_the_same_faults_and_every_service_is_killed() {
        let counts = Counts {
            kills: 7,
            outages: 2,
            restarts: 3,
        };
        let draw = |seed| {
            let mut random = StdRng::seed_from_u64(seed);
            Schedule::draw(&mut random, Duration::from_secs(60), counts)
        };
        let one = draw(1);
        assert_eq!(format!("{one:?}"), format!("{:?}", draw(1)));
        assert_ne!(format!("{one:?}"), format!("{:?}", draw(2)));
        for service in 0..SERVICES.len() {
            let kills = one.kills.iter().filter(|kill| kill.service == service);
            assert!(kills.count() >= 2, "{one:?}");
        }
        assert_eq!((one.outages.len(), one.restarts.len()), (2, 3));
        assert!(one.kills.is_sorted_by_key(|kill| kill.at), "{one:?}");
    }
}
