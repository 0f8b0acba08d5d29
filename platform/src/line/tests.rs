//! Which bytes of answers count as room, and which connections are ended.

use tokio_util::task::TaskTracker;

use super::*;

const MEMORY: usize = 1 << 20;

fn is_taken(admission: &Admission, bytes: usize) -> bool {
    admission.free_bytes() == MEMORY - bytes
}

/// An answer that HTTP/2 has taken all of.
async fn taken_over(admission: &Admission, line: &Arc<Line>, bytes: usize) {
    let room = admission.bytes(line.share(), bytes).unwrap();
    let token = TaskTracker::new().token();
    let data = vec![0; bytes].into();
    let mut answer = Answer::new(data, None, room, token, Some(line.clone()));
    while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut answer).poll_frame(cx)).await {
        assert!(frame.unwrap().is_data());
    }
}

#[tokio::test]
async fn what_a_socket_has_not_taken_has_room() {
    let limits = Limits {
        memory: MEMORY,
        write_timeout: Duration::from_millis(40),
        ..Limits::default()
    };
    let admission = Admission::new(&limits);
    let seat = admission.seat().unwrap();
    let line = Line::new(&admission, seat, None, &limits, 1);
    line.wrote(None);
    taken_over(&admission, &line, 40_000).await;
    assert!(is_taken(&admission, SEND_BUFFER));
    taken_over(&admission, &line, 100).await;
    // however long it takes nothing
    tokio::time::sleep(10 * limits.write_timeout).await;
    assert!(is_taken(&admission, SEND_BUFFER + 100));
    // in the order in which they were handed over
    line.wrote(Some(100));
    line.wrote(Some(SEND_BUFFER - 101));
    line.wrote(None);
    assert!(is_taken(&admission, SEND_BUFFER + 100));
    line.wrote(Some(1));
    assert!(is_taken(&admission, 100));
    // more of the answers had left than was known: a socket that takes more has them all
    tokio::time::timeout(Duration::from_secs(10), async {
        while !is_taken(&admission, 0) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("all room comes back");
}

#[tokio::test]
async fn a_first_word_is_waited_for_and_half_of_it_is_none() {
    let limits = Limits {
        idle_timeout: Duration::from_millis(100),
        ..Limits::default()
    };
    for (bytes, is_left) in [(0, true), (23, true), (24, false)] {
        let admission = Admission::new(&limits);
        let seat = admission.seat().unwrap();
        let line = Line::new(&admission, seat, None, &limits, 24);
        for _ in 0..bytes {
            line.heard(1);
        }
        tokio::time::sleep(4 * limits.idle_timeout).await;
        assert_eq!(line.end().is_cancelled(), is_left, "{bytes} bytes");
    }
}
