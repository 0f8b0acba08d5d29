//! Which bytes of answers count as room, and which connections are ended.

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::task::TaskTracker;

use super::*;
use crate::listen;

const MEMORY: usize = 1 << 20;

fn is_taken(admission: &Admission, bytes: usize) -> bool {
    admission.free_bytes() == MEMORY - bytes
}

async fn soon_taken(admission: &Admission, bytes: usize) {
    let taken = async {
        while !is_taken(admission, bytes) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let taken = tokio::time::timeout(Duration::from_secs(10), taken).await;
    taken.unwrap_or_else(|_| panic!("{} bytes are free", admission.free_bytes()));
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
    assert!(is_taken(&admission, SHORT));
    taken_over(&admission, &line, 100).await;
    // however long it takes nothing
    tokio::time::sleep(10 * limits.write_timeout).await;
    assert!(is_taken(&admission, SHORT + 100));
    // in the order in which they were handed over
    line.wrote(Some(100));
    line.wrote(Some(SHORT - 101));
    line.wrote(None);
    assert!(is_taken(&admission, SHORT + 100));
    line.wrote(Some(1));
    assert!(is_taken(&admission, 100));
    // more of the answers had left than was known: a socket that takes more has them all
    soon_taken(&admission, 0).await;
}

#[tokio::test]
async fn of_what_is_thrown_away_a_piece_keeps_its_room() {
    let limits = Limits {
        memory: MEMORY,
        write_timeout: Duration::from_millis(40),
        ..Limits::default()
    };
    let admission = Admission::new(&limits);
    let seat = admission.seat().unwrap();
    let line = Line::new(&admission, seat, None, &limits, 1);
    let room = admission.bytes(line.share(), 100_000).unwrap();
    let (data, token) = (vec![0; 100_000].into(), TaskTracker::new().token());
    let answer = Answer::new(data, None, room, token, Some(line.clone()));
    soon_taken(&admission, PIECE).await;
    drop(answer);
    soon_taken(&admission, 0).await;
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

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()[..]];
    [&head.concat(), payload].concat()
}

fn initial_window(bytes: u32) -> Vec<u8> {
    const SETTINGS: u8 = 4;
    frame(
        SETTINGS,
        0,
        0,
        &[&[0, 4][..], &bytes.to_be_bytes()].concat(),
    )
}

#[tokio::test]
async fn a_peer_that_takes_its_windows_back_is_left() {
    const OPEN: u32 = (1 << 31) - 1;
    const BYTES: usize = 10_000;
    let limits = Limits {
        write_timeout: Duration::from_millis(200),
        ..Limits::default()
    };
    let admission = Admission::new(&limits);
    let seat = admission.seat().unwrap();
    let line = Line::new(&admission, seat, None, &limits, 1);
    let answering = line.clone();
    let service = service_fn(move |_| {
        let room = admission.bytes(answering.share(), BYTES).unwrap();
        let (data, token) = (vec![0; BYTES].into(), TaskTracker::new().token());
        let answer = Answer::new(data, None, room, token, Some(answering.clone()));
        std::future::ready(Ok::<_, io::Error>(http::Response::new(answer)))
    });
    let (server, mut peer) = tokio::io::duplex(16 * 1024);
    let builder = listen::http2(&limits);
    let connection = builder.serve_connection(TokioIo::new(server), service);
    tasks::spawn(connection.into_owned());

    let mut said = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    said.extend(initial_window(OPEN));
    said.extend(frame(8, 0, 0, &(OPEN - 65_535).to_be_bytes()));
    for stream in (1..100).step_by(2) {
        // POST http://x/, without a body
        said.extend(frame(1, 5, stream, &[0x83, 0x86, 0x84, 0x41, 1, b'x']));
    }
    peer.write_all(&said).await.unwrap();
    // one thread: the answers are handed over, as far as they are, and the pipe is full
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
    }
    peer.write_all(&initial_window(0)).await.unwrap();
    let reads = async {
        let mut taken = vec![0; 64 * 1024];
        while peer.read(&mut taken).await.is_ok_and(|bytes| bytes > 0) {}
    };
    let left = async {
        tokio::join!(line.end().cancelled(), async {
            tokio::select! {
                () = reads => {}
                () = line.end().cancelled() => {}
            }
        })
    };
    let left = tokio::time::timeout(Duration::from_secs(10), left).await;
    left.expect("a connection with answers that HTTP/2 keeps is left");
}
