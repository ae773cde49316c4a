import CAHN
import Foundation

/// A language model that reads texts of any length in constant memory.
///
/// ```swift
/// let model = try await AHNModel(contentsOf: url)
/// let session = try model.session(instructions: "Answer in one sentence.")
/// try await session.read(text) { read in print(read.fraction) }
/// for try await piece in session.streamResponse(to: "Who is the captain?") {
///   print(piece, terminator: "")
/// }
/// ```
///
/// > Note: A model may be used from any task. All computing is done by one thread that the library
/// > owns; two sessions that read at once take turns.
///
/// > Warning: Do not link mlx-swift into the same app: two copies of MLX in a process may not work
/// > as expected.
public final class AHNModel: @unchecked Sendable {
  // The C library may be called from any thread; the pointer never changes.
  let handle: OpaquePointer

  /// Opens a directory that `ahn-mlx export-app` wrote.
  ///
  /// - Throws: ``AHNError``, if it is damaged, or was exported for another device or version of MLX.
  public convenience init(contentsOf url: URL) async throws {
    try await self.init(opened: Blocking.run { try AHNModel.open(url) })
  }

  private init(opened: Opened) { handle = opened.handle }

  // A pointer on its way from the thread that opened it.
  private struct Opened: @unchecked Sendable { let handle: OpaquePointer }

  private static func open(_ url: URL) throws -> Opened {
    try useBundledKernels()
    var made: OpaquePointer?
    try AHNError.check(ahn_model_open(url.path, &made))
    return Opened(handle: made!)
  }

  deinit { ahn_model_close(handle) }

  /// What the model is called.
  public var name: String { String(cString: ahn_model_name(handle)) }

  /// A session that has read nothing.
  ///
  /// - Parameters:
  ///   - instructions: The system message, or `nil` for the chat template's own.
  ///   - plain: Continue texts as they are, without the chat template.
  /// - Throws: ``AHNError``, if the model has no chat template, or it has no place for instructions.
  public func session(instructions: String? = nil, plain: Bool = false) throws -> AHNSession {
    var made: OpaquePointer?
    let status = withOptionalCString(instructions) { text in
      var options = ahn_session_options(instructions: text, plain: plain)
      return ahn_session_new(handle, &options, &made)
    }
    try AHNError.check(status)
    return AHNSession(model: self, handle: made!)
  }

  /// A session that goes on where a memory file (`.ahn`) ends. The file may have been written by
  /// ``AHNSession/save(to:)`` or by `ahn-mlx digest`, for this very model.
  ///
  /// - Throws: ``AHNError``, if it is damaged or of another model.
  public func session(memory url: URL) async throws -> AHNSession {
    let made = try await Blocking.run {
      var made: OpaquePointer?
      try AHNError.check(ahn_session_load(self.handle, url.path, &made))
      return Opened(handle: made!)
    }
    return AHNSession(model: self, handle: made.handle)
  }

  /// Token ids of a text.
  public func encode(_ text: String) throws -> [Int32] {
    var ids: UnsafeMutablePointer<Int32>?
    var count = 0
    var text = text
    try AHNError.check(
      text.withUTF8 { bytes in
        bytes.withMemoryRebound(to: CChar.self) {
          ahn_model_encode(handle, $0.baseAddress, $0.count, &ids, &count)
        }
      })
    defer { ahn_free(ids) }
    return Array(UnsafeBufferPointer(start: ids, count: count))
  }

  /// The text of tokens.
  public func decode(_ ids: [Int32]) throws -> String {
    var text: UnsafeMutablePointer<CChar>?
    var count = 0
    try AHNError.check(ahn_model_decode(handle, ids, ids.count, &text, &count))
    defer { ahn_free(text) }
    let bytes = UnsafeRawBufferPointer(start: text, count: count)
    return String(decoding: bytes, as: UTF8.self)
  }

  /// Limits of the whole process, in bytes: what MLX may hold at all, and what it may keep for
  /// reuse. `nil` leaves one as it is.
  public static func limit(memory: Int? = nil, cache: Int? = nil) throws {
    if let memory { try AHNError.check(ahn_set_memory_limit(memory)) }
    if let cache { try AHNError.check(ahn_set_cache_limit(cache)) }
  }

  /// Bytes that MLX holds now, weights included.
  public static var memoryInUse: Int { ahn_memory_in_use() }

  // MLX looks for its kernels beside its library, where they cannot be signed.
  private static func useBundledKernels() throws { _ = try kernels.get() }

  private static let kernels: Result<Void, Error> = Result {
    #if os(macOS) && AHN_BUNDLED_KERNELS
      if let url = Bundle.module.url(forResource: "mlx", withExtension: "metallib") {
        try AHNError.check(ahn_set_metallib(url.path))
      }
    #endif
  }
}

func withOptionalCString<Result>(
  _ text: String?, _ body: (UnsafePointer<CChar>?) -> Result
) -> Result {
  guard let text else { return body(nil) }
  return text.withCString(body)
}
