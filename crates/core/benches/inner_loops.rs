//! What happens for every piece, in contents of few and of many pieces: the time a piece must not
//! grow with their number. `cargo bench -p potluck-core`.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a bench ends where something is not as it should be"
)]

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use potluck_core::bitfield::Bitfield;
use potluck_core::id::{PeerId, Piece};
use potluck_core::layout::Layout;
use potluck_core::proof::{Proof, piece_value};
use potluck_core::sharing::{self, Sharing};
use potluck_core::swarm::{Arrived, Host, Output, Swarm};
use potluck_core::time::Moment;
use potluck_core::wire::stream::{Channel, Frame, Side};

/// Pieces of 4 MiB: 16 GiB, 200 GiB and twice that.
const CONTENTS: [u32; 3] = [4_096, 51_200, 102_400];
const HOSTS: u32 = 16;
/// Pieces moved in one measurement.
const MOVED: u64 = 1_000;

fn layout(pieces: u32) -> Arc<Layout> {
    let layout = Layout::new([u64::from(pieces) << 22]).unwrap();
    assert_eq!(layout.pieces(), pieces);
    Arc::new(layout)
}

/// A fetcher whose hosts answer in turn, a piece a step.
struct Fetcher {
    swarm: Swarm,
    asked: VecDeque<(Host, Piece)>,
    us: u64,
}

impl Fetcher {
    fn new(pieces: u32) -> Self {
        let mut swarm = Swarm::new(layout(pieces), Bitfield::none(pieces), 1);
        for host in (0..HOSTS).map(Host) {
            swarm.on_host(Moment::ZERO, host);
            swarm.on_have(Moment::ZERO, host, &Bitfield::all(pieces));
        }
        Self { swarm, asked: VecDeque::new(), us: 0 }
    }

    fn step(&mut self) {
        while let Some(output) = self.swarm.poll_output() {
            if let Output::Ask { host, pieces } = output {
                self.asked.extend(pieces.into_iter().map(|piece| (host, piece)));
            }
        }
        let (host, piece) = self.asked.pop_front().unwrap();
        self.us += 500;
        let now = Moment::from_micros(self.us);
        self.swarm.on_piece(now, host, piece, Arrived::New);
        self.swarm.on_have_more(now, Host(0), &[piece]);
        black_box(self.swarm.next_deadline());
        self.swarm.tick(now);
    }
}

fn picker(c: &mut Criterion) {
    let mut group = c.benchmark_group("swarm: a piece asked for, taken in and announced");
    group.throughput(Throughput::Elements(MOVED)).sample_size(20);
    for pieces in CONTENTS {
        group.bench_function(BenchmarkId::from_parameter(pieces), |b| {
            b.iter_batched_ref(
                || Fetcher::new(pieces),
                |fetcher| (0..MOVED).for_each(|_| fetcher.step()),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

/// A seed whose readers take what they are granted.
struct Seed {
    sharing: Sharing,
    us: u64,
    sent: u64,
}

impl Seed {
    fn new(pieces: u32) -> Self {
        let mut sharing = Sharing::new(1);
        sharing.add(0, layout(pieces), &Bitfield::all(pieces), true);
        for host in 0..HOSTS {
            sharing.on_host(Moment::ZERO, Host(host), PeerId([host as u8; 32]));
            sharing.on_open(Moment::ZERO, Host(host), 0);
        }
        Self { sharing, us: 0, sent: 0 }
    }

    fn serve(&mut self, pieces: u64) {
        while self.sent < pieces {
            self.us += 500;
            let now = Moment::from_micros(self.us);
            let outputs: Vec<sharing::Output> =
                std::iter::from_fn(|| self.sharing.poll_output()).collect();
            for output in outputs {
                match output {
                    sharing::Output::Grant { host, content, pieces } => {
                        self.sharing.on_want(now, host, content, &pieces);
                    }
                    sharing::Output::Serve { host, content, piece } => {
                        self.sent += 1;
                        self.sharing.on_sent(now, host, content, piece);
                        self.sharing.on_their_have_more(now, host, content, &[piece]);
                        let other = Host((host.0 + 1) % HOSTS);
                        self.sharing.on_their_have_more(now, other, content, &[piece]);
                    }
                    _ => {}
                }
            }
            if self.sharing.next_deadline().is_some_and(|due| due <= now) {
                self.sharing.tick(now);
            }
        }
    }
}

fn grants(c: &mut Criterion) {
    let mut group = c.benchmark_group("sharing: a piece granted, asked for, sent and announced");
    group.throughput(Throughput::Elements(MOVED)).sample_size(20);
    for pieces in CONTENTS {
        group.bench_function(BenchmarkId::from_parameter(pieces), |b| {
            b.iter_batched_ref(
                || Seed::new(pieces),
                |seed| seed.serve(MOVED),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

fn bitfield(c: &mut Criterion) {
    let mut field = Bitfield::none(51_200);
    (0..51_200).step_by(3).for_each(|p| {
        field.insert(Piece(p));
    });
    let bytes = field.to_bytes();
    c.bench_function("bitfield: 51,200 pieces written and read", |b| {
        b.iter(|| Bitfield::from_bytes(&black_box(&field).to_bytes(), 51_200));
    });
    c.bench_function("bitfield: 51,200 pieces counted one by one", |b| {
        let field = Bitfield::from_bytes(&bytes, 51_200).unwrap();
        b.iter(|| black_box(&field).iter().count());
    });
}

fn codec(c: &mut Criterion) {
    let channel = Channel { number: 7, opener: Side::Us };
    let frame = Frame::HaveMore(channel, (0..1_000).map(Piece).collect());
    let mut bytes = Vec::new();
    c.bench_function("codec: a frame of 1,000 pieces written and read", |b| {
        b.iter(|| {
            bytes.clear();
            black_box(&frame).encode(&mut bytes);
            // What reads the stream takes the length off.
            black_box(Frame::decode(&bytes[4..])).unwrap();
        });
    });
}

fn proof(c: &mut Criterion) {
    let piece = vec![7; 64 << 10];
    let layout = Layout::new([2 * piece.len() as u64]).unwrap();
    let value = |p| piece_value(&layout.place(Piece(p)).unwrap(), 2, &piece);
    let whole = blake3::hash(&[piece.clone(), piece.clone()].concat());
    let list = [value(0), value(1)].concat();
    let proof = Proof::of_file(*whole.as_bytes(), &layout, &list).unwrap();
    let mut group = c.benchmark_group("proof");
    group.throughput(Throughput::Bytes(piece.len() as u64));
    group.bench_function("a piece of 64 KiB checked", |b| {
        b.iter(|| assert!(proof.verify(&layout, Piece(1), &[black_box(&piece)])));
    });
    group.finish();
}

criterion_group!(benches, picker, grants, bitfield, codec, proof);
criterion_main!(benches);
