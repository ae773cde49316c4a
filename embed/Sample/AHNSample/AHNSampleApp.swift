import SwiftUI

/// One window: drop a text, watch it being read, ask.
@main
struct AHNSampleApp: App {
  @State private var reader = Reader()

  var body: some Scene {
    Window("Reader", id: "reader") {
      ReaderView(reader: reader)
        .frame(minWidth: 480, minHeight: 420)
        .task { await reader.open() }
    }
  }
}
