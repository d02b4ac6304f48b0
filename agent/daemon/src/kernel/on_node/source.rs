//! The way to the source: what queues, what goes on, what it costs.

use super::*;

#[test]
#[ignore = "needs root and a node's kernel"]
fn reads_wait_while_there_is_no_path_and_go_on_when_there_is_one() {
    let mut bed = Bed::new();
    let volume = Volume::new();
    let (_, import, namespace) = bed.source(volume);
    let src = volume.name(1, Role::Src);

    bed.set(&src, Target::Queue { path: None });
    println!("without a path: {}", bed.status(&src));
    let number = bed.dm.device(&src).unwrap().unwrap().number;
    let top = volume.name(1, Role::Clone);
    bed.set(&top, Target::Linear { device: number, offset: Sectors(0) });
    let above = bed.dm.device(&top).unwrap().unwrap().number;
    let first = |device| behind(move || read_at(&open(device, false), 16384).map(|b| b[0]));
    let good = |receiver: &Receiver<io::Result<u8>>| {
        assert_eq!(receiver.recv_timeout(LONG).unwrap().unwrap(), pattern(16384));
    };

    let reads = [first(number), first(above)];
    reads.iter().for_each(|read| still_waits(read, SHORT));
    println!("with reads waiting: {}", bed.status(&src));
    bed.set_within(&src, Target::Queue { path: Some(namespace) }, SHORT).unwrap();
    reads.iter().for_each(good);

    // The same again, the other way round and back: path away on purpose.
    bed.set_within(&src, Target::Queue { path: None }, SHORT).unwrap();
    let reads = [first(number), first(above)];
    reads.iter().for_each(|read| still_waits(read, SHORT));
    bed.set_within(&src, Target::Queue { path: None }, SHORT).unwrap();
    reads.iter().for_each(|read| still_waits(read, SHORT));
    bed.set_within(&src, Target::Queue { path: Some(namespace) }, SHORT).unwrap();
    reads.iter().for_each(good);

    // The controller is deleted under it.
    timed("disconnect under the multipath", || nvme::disconnect(&import.nqn, LONG).unwrap());
    let reads = [first(number), first(above)];
    reads.iter().for_each(|read| still_waits(read, Duration::from_secs(3)));
    println!("after the controller is gone: {}", bed.status(&src));
    println!("seen: {:?}", nvme::observe(&import).unwrap());
    let again = bed.connect(&import);
    println!("namespace was {namespace}, is {again}");
    assert_ne!(namespace, again, "the number was reused while a table stood on it");
    bed.set_within(&src, Target::Queue { path: Some(again) }, SHORT).unwrap();
    reads.iter().for_each(good);

    // The target goes and comes back: the controller reconnects by itself.
    let export = bed.exports[0].clone();
    timed("unpublish under the multipath", || bed.target.unpublish(&export).unwrap());
    let reads = [first(number), first(above)];
    reads.iter().for_each(|read| still_waits(read, Duration::from_secs(3)));
    println!("target away: {} {:?}", bed.status(&src), nvme::observe(&import).unwrap());
    bed.target.publish(&export).unwrap();
    timed("reads after the target came back", || reads.iter().for_each(good));
    let back = nvme::observe(&import).unwrap();
    println!("target back: {} {back:?}", bed.status(&src));
    assert_eq!(back.namespace, Some(again));

    // Requests that must fail, do: a source that is declared dead.
    nvme::disconnect(&import.nqn, LONG).unwrap();
    let reads = [first(number), first(above)];
    reads.iter().for_each(|read| still_waits(read, SHORT));
    bed.dm.message(&src, "fail_if_no_path").unwrap();
    for read in &reads {
        assert!(read.recv_timeout(LONG).unwrap().is_err());
    }
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn a_failed_path_is_taken_up_again() {
    let mut bed = Bed::new();
    let volume = Volume::new();
    let (_, _, namespace) = bed.source(volume);
    let src = volume.name(1, Role::Src);
    bed.set(&src, Target::Queue { path: Some(namespace) });
    bed.dm.message(&src, &format!("fail_path {namespace}")).unwrap();
    println!("failed: {}", bed.status(&src));
    let number = bed.dm.device(&src).unwrap().unwrap().number;
    let read = behind(move || read_at(&open(number, false), 16384).map(|block| block[0]));
    still_waits(&read, SHORT);
    bed.set(&src, Target::Queue { path: Some(namespace) });
    assert_eq!(read.recv_timeout(LONG).unwrap().unwrap(), pattern(16384));
    println!("taken up: {}", bed.status(&src));
}

#[test]
#[ignore = "needs root and a node's kernel"]
fn a_stuck_device_keeps_its_table_and_is_not_left_suspended() {
    let bed = Bed::new();
    let volume = Volume::new();
    let made = bed.vg.create(Some((&volume.data(1), SIZE)), None, &[]).unwrap();
    let lv = bed.number(&made[0]);
    let (src, top) = (volume.name(1, Role::Src), volume.name(1, Role::Clone));
    bed.set(&src, Target::Queue { path: None });
    let below = bed.dm.device(&src).unwrap().unwrap().number;
    bed.set(&top, Target::Linear { device: below, offset: Sectors(0) });
    let number = bed.dm.device(&top).unwrap().unwrap().number;
    let read = behind(move || read_at(&open(number, false), 0).map(|block| block[0]));
    still_waits(&read, SHORT);

    let live = bed.dm.device(&top).unwrap().unwrap();
    for attempt in 0..3 {
        let before = Instant::now();
        let error = if attempt == 1 {
            bed.dm.suspend(&top, SHORT).unwrap_err()
        } else {
            bed.set_within(&top, Target::Error, SHORT).unwrap_err()
        };
        println!("stuck: {error} after {:?}", before.elapsed());
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let mut now = bed.dm.device(&top).unwrap().unwrap();
        now.open_count = live.open_count;
        assert_eq!(now, live);
    }
    // It still works.
    bed.set(&src, Target::Queue { path: Some(lv) });
    assert_eq!(read.recv_timeout(LONG).unwrap().unwrap(), 0);
    bed.dm.suspend(&top, SHORT).unwrap();
    bed.dm.suspend(&top, SHORT).unwrap();
    assert!(bed.dm.device(&top).unwrap().unwrap().suspended);
    bed.dm.resume(&top).unwrap();
    bed.dm.resume(&top).unwrap();
    assert!(!bed.dm.device(&top).unwrap().unwrap().suspended);
}

#[test]
#[ignore = "needs root and a node's kernel; measures"]
fn a_source_that_queues_costs_little() {
    let mut bed = Bed::new();
    let volume = Volume::new();
    let (_, _, namespace) = bed.source(volume);
    let (queue, linear) = (volume.name(1, Role::Src), volume.name(2, Role::Src));
    bed.set(&queue, Target::Queue { path: Some(namespace) });
    bed.set(&linear, Target::Linear { device: namespace, offset: Sectors(0) });
    let files =
        [&queue, &linear].map(|name| open(bed.dm.device(name).unwrap().unwrap().number, false));
    // Alternating read by read, so that whatever else runs here disturbs both.
    for (size, reads) in [(MIB, 64), (65536, 400), (4096, 800)] {
        let mut buffer = Buffer::new(size);
        let mut times = [Vec::new(), Vec::new()];
        for n in 0..reads {
            for side in [n % 2, 1 - n % 2] {
                let before = Instant::now();
                let at = (n as u64 * size) % SIZE;
                files[side].read_exact_at(buffer.bytes(), at).unwrap();
                times[side].push(before.elapsed());
            }
        }
        let [queue, linear] = times.map(|mut times| {
            times.sort_unstable();
            let total: Duration = times.iter().sum();
            (times[times.len() / 2].as_secs_f64() * 1e3, total.as_secs_f64())
        });
        println!(
            "{size} B: multipath median {:.2} ms, sum {:.2} s; linear {:.2} ms, {:.2} s; \
             throughput {:.2} (median), {:.2} (sum)",
            queue.0,
            queue.1,
            linear.0,
            linear.1,
            linear.0 / queue.0,
            linear.1 / queue.1
        );
    }
}
