use super::*;

/// Does what is asked for, and gives back what is to be served.
fn served(sharing: &mut Sharing) -> Vec<Piece> {
    let outputs = std::iter::from_fn(|| sharing.poll_output());
    let served = outputs.filter_map(|output| match output {
        Output::Serve { piece, .. } => Some(piece),
        Output::Busy { .. } | Output::Grant { .. } | Output::ShowHave { .. } => None,
    });
    served.collect()
}

/// It was not once: what a closed channel had under way counted for ever, and after the second one
/// nobody was served any more.
#[test]
fn what_a_reader_that_goes_in_the_middle_leaves_is_room_for_others() {
    let layout = Arc::new(Layout::new([1 << 20]).unwrap());
    let (now, pieces) = (Moment::ZERO, [Piece(0), Piece(1), Piece(2)]);
    let mut sharing = Sharing::new(0);
    sharing.add(7, Arc::clone(&layout), &Bitfield::all(layout.pieces()), false);
    for nth in 0..4 {
        let host = Host(nth);
        sharing.on_host(now, host, PeerId([1; 32]));
        sharing.on_open(now, host, 7);
        sharing.on_want(now, host, 7, &pieces);
        assert_eq!(served(&mut sharing).len() as u64, SENDING, "reader {nth}");
        sharing.check();
        if nth % 2 == 0 {
            sharing.on_closed(now, host, 7);
        } else {
            sharing.on_gone(now, host);
        }
        sharing.check();
    }
}
