//! How much a peer may hold while others want some.

use super::*;

fn admission() -> Admission {
    Admission::new(&Limits {
        in_flight: 4,
        memory: 4_000,
        connections: 2,
        ..Limits::default()
    })
}

#[tokio::test]
async fn a_peer_has_all_places_until_another_finds_none() {
    let (admission, one, other) = (admission(), Arc::default(), Arc::default());
    let mut places: Vec<_> = (0..4)
        .map(|_| admission.place(&one).ok().unwrap())
        .collect();
    assert!(admission.place(&one).is_err());
    // its own refusal says nothing of others: it gets back what it lets go
    places.pop();
    places.push(admission.place(&one).ok().unwrap());
    assert_eq!(admission.place(&other).err(), Some(Bound::Calls));
    places.pop();
    assert!(
        admission.place(&one).is_err(),
        "more than half, and another was refused"
    );
    let _others = admission.place(&other).ok().unwrap();
    places.truncate(1);
    places.push(admission.place(&one).ok().unwrap());
    assert!(admission.place(&one).is_err());
    *locked(&admission.0.refused) = Instant::now().checked_sub(CROWDED);
    assert!(admission.place(&one).is_ok());
}

#[tokio::test]
async fn many_busy_peers_leave_places_for_one_that_asks_for_few() {
    let admission = Admission::new(&Limits {
        in_flight: 512,
        ..Limits::default()
    });
    let peers: Vec<Arc<Share>> = (0..9).map(|_| Arc::default()).collect();
    let mut places = Vec::new();
    for _ in 0..100 {
        places.extend(peers.iter().filter_map(|peer| admission.place(peer).ok()));
    }
    assert_eq!(places.len(), 512 - 512 / RESERVE);
    let probe = Arc::default();
    assert!(admission.place(&probe).is_ok());
    places.clear();
    *locked(&admission.0.refused) = Instant::now().checked_sub(CROWDED);
    places.extend((0..512).filter_map(|_| admission.place(&peers[0]).ok()));
    assert_eq!(places.len(), 512, "alone, it has all of them");
}

#[tokio::test]
async fn a_peer_with_nearly_all_places_lets_another_grow() {
    let admission = Admission::new(&Limits {
        in_flight: 512,
        ..Limits::default()
    });
    let (greedy, other): (Arc<Share>, Arc<Share>) = Default::default();
    let mut others: Vec<_> = (0..20)
        .filter_map(|_| admission.place(&other).ok())
        .collect();
    let mut places = Vec::new();
    places.extend((0..512).filter_map(|_| admission.place(&greedy).ok()));
    assert_eq!(places.len(), 512 - 512 / RESERVE - 20);
    // its calls end one by one, and it asks first for the place that is free
    for _ in 0..512 {
        places.pop();
        places.extend(admission.place(&greedy));
        others.extend(admission.place(&other));
    }
    assert_eq!(places.len(), 512 / 2);
    assert_eq!(others.len(), 512 - 512 / RESERVE - places.len());
}

#[tokio::test]
async fn a_peer_has_a_quarter_of_the_bytes_and_one_message_always() {
    let (admission, one, other) = (admission(), Arc::default(), Arc::default());
    let held = admission.bytes(&one, 600).ok().unwrap();
    assert_eq!(admission.bytes(&one, 600).err(), Some(Bound::Bytes));
    assert!(admission.bytes(&one, 400).is_ok());
    assert!(
        admission.bytes(&other, 2_900).is_ok(),
        "larger than a quarter, but one"
    );
    drop(held);
    assert!(admission.bytes(&one, 1_000).is_ok());
    assert_eq!(one.bytes.load(Ordering::Relaxed), 0);
    assert_eq!(admission.free_bytes(), 4_000);
}

#[tokio::test]
async fn several_peers_leave_bytes_for_one_that_asks_for_few() {
    let admission = admission();
    let (peers, late): ([Arc<Share>; 6], Arc<Share>) = <_>::default();
    let mut taken = Vec::new();
    // in small pieces, of which the last one would fit
    for _ in 0..4_000 {
        taken.extend(
            peers
                .iter()
                .filter_map(|peer| admission.bytes(peer, 1).ok()),
        );
    }
    assert_eq!(taken.len(), 4_000 - 4_000 / RESERVE);
    assert!(admission.bytes(&late, 4_000 / 64).is_ok());
    assert_eq!(admission.bytes(&late, 400).err(), Some(Bound::Bytes));
}

#[tokio::test]
async fn hundreds_of_peers_leave_room_for_one_more() {
    let limits = Limits {
        in_flight: 512,
        memory: 64 << 20,
        ..Limits::default()
    };
    let admission = Admission::new(&limits);
    let peers: Vec<Arc<Share>> = (0..200).map(|_| Arc::default()).collect();
    let (mut places, mut bytes) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        places.extend(peers.iter().filter_map(|peer| admission.place(peer).ok()));
        let answers = peers.iter().map(|peer| admission.bytes(peer, 10_000).ok());
        bytes.extend(answers.flatten());
    }
    let taken = (places.len(), bytes.len());
    const NEW: usize = 5;
    for _ in 0..NEW {
        let one_more = Arc::default();
        places.extend(admission.place(&one_more));
        bytes.extend(admission.bytes(&one_more, 10_000));
    }
    assert_eq!((places.len(), bytes.len()), (taken.0 + NEW, taken.1 + NEW));
    drop((places, bytes));
    for stock in [&admission.0.places, &admission.0.bytes] {
        assert_eq!(stock.free.available_permits(), stock.most);
    }
}

#[tokio::test]
async fn a_certificate_has_one_share_and_others_one_each() {
    let admission = admission();
    let (one, same) = (admission.share(Some("a")), admission.share(Some("a")));
    assert!(Arc::ptr_eq(&one, &same));
    assert!(!Arc::ptr_eq(&one, &admission.share(Some("b"))));
    assert!(!Arc::ptr_eq(&admission.share(None), &admission.share(None)));
    drop((one, same));
    admission.share(Some("c"));
    assert!(
        locked(&admission.0.named).len() <= 1,
        "nobody is remembered for ever"
    );
}

#[tokio::test]
async fn connections_over_the_limit_are_told_and_then_not_even_that() {
    let admission = admission();
    let seats: Vec<_> = (0..2 + TOLD).map(|_| admission.seat().unwrap()).collect();
    assert_eq!(seats.iter().filter(|seat| seat.over).count(), TOLD);
    assert!(admission.seat().is_none());
    drop(seats);
    assert!(!admission.seat().unwrap().over);
}
